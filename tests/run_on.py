"""Makes runs of tiny configs on a subset of the fake devices."""

import dataclasses

import jax

from skyformer_jax.training import mesh as meshes
from skyformer_jax.training.run import make_run


def run_on(config, data=1, seq=1, *, optimizer=None, **train):
    """Returns a config's run on a data x seq mesh.

    Args:
      config: the config; it is copied.
      data: size of the mesh axis for the batch.
      seq: size of the mesh axis for the sequence.
      optimizer: replaces the run's optimizer if given.
      **train: values to set in config.train.
    """
    config = config.copy_and_resolve_references()
    config.train.update(train)
    run = make_run(config, meshes.make_mesh(data, seq, devices=jax.devices()[: data * seq]))
    return run if optimizer is None else dataclasses.replace(run, optimizer=optimizer)
