"""Compiles the steps of step.py for all devices of the mesh and all seeds of the run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from skyformer_jax.data.batches import Batch
from skyformer_jax.training.mesh import DATA, batch_specs, replicated, shard_map
from skyformer_jax.training.pmap import pmap
from skyformer_jax.training.run import Run
from skyformer_jax.training.state import TrainState
from skyformer_jax.training.step import predict_step, train_step

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
PredictStep = Callable[[Any, Batch, jax.Array | None, jax.Array], jax.Array]

_BACKENDS = {"shard_map": shard_map, "pmap": pmap}


def make_train_step(run: Run) -> TrainStep:
    """Returns the compiled training step of a run.

    The function takes the states [seeds, ...], whose buffers it donates, and a batch
    [seeds, batch, ...] on the mesh. It returns the states after the step, and a copy of their sums.
    """
    over_mesh = _BACKENDS[run.config.parallel.backend]
    over_seeds = jax.vmap(functools.partial(train_step, run))

    def on_device(states: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        states = over_seeds(states, batch)
        return states, states.sums

    def call(states: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        in_specs = (P(), batch_specs(batch, axis=1))
        return over_mesh(on_device, run.mesh, in_specs, (P(), P()))(states, batch)

    return jax.jit(call, donate_argnums=0)


def make_predict_step(run: Run) -> PredictStep:
    """Returns the compiled prediction of a run.

    The function takes the variables [seeds, ...] of the states, a batch [batch, ...] on the mesh,
    rng, and rows, int [batch] on the mesh; see step.predict_step. It returns logits
    [seeds, batch, classes].
    """
    over_seeds = jax.vmap(functools.partial(predict_step, run), in_axes=(0, None, None, None))

    def call(variables: Any, batch: Batch, rng: jax.Array | None, rows: jax.Array) -> jax.Array:
        in_specs = (P(), batch_specs(batch), P(), P(DATA))
        mapped = shard_map(over_seeds, run.mesh, in_specs, P(None, DATA))
        return mapped(variables, batch, rng, rows)

    # All logits are gathered on all devices, so every process can read them.
    return jax.jit(call, out_shardings=replicated(run.mesh))
