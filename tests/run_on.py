"""Runs of tiny configs on some of the fake devices."""

import dataclasses

import jax

from skyformer_jax.training import mesh as meshes
from skyformer_jax.training.run import make_run


def run_on(config, data=1, seq=1, *, optimizer=None, **train):
    """A config's run on data x seq devices, with changes of config.train, or another optimizer."""
    config = config.copy_and_resolve_references()
    config.train.update(train)
    run = make_run(config, meshes.make_mesh(data, seq, devices=jax.devices()[: data * seq]))
    return run if optimizer is None else dataclasses.replace(run, optimizer=optimizer)
