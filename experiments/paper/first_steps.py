"""Takes the first steps of training and keeps the parameters after each for several scripts."""

import json
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np

from experiments.paper import grid
from experiments.records import as_read, provenance, replacing
from skyformer_jax.data.batches import Batch, stack_batches, training_batches
from skyformer_jax.data.examples import Examples
from skyformer_jax.progress import say, track
from skyformer_jax.training import compilation_cache, step
from skyformer_jax.training import config as configs
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training.run import Run, make_run
from skyformer_jax.training.sharded_step import make_train_step
from skyformer_jax.training.state import init_states, take


def one_device_run(config: ml_collections.ConfigDict) -> Run:
    """Makes the run of a checked config on the first device only."""
    compilation_cache.use_cache(config.compilation_cache)
    return make_run(config, meshes.make_mesh(1, 1, jax.devices()[:1]))


def first_batches(run: Run, split: Examples, num_steps: int) -> list[Batch]:
    """Returns the batches of the first steps, as training reads them."""
    train, max_length = run.config.train, run.config.model.max_length
    batches = training_batches(split, train.batch_size, max_length, seed=run.config.seed)
    return [next(batches) for _ in range(num_steps)]


def model_inputs(run: Run, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns tokens, int32, and mask, bool, of a batch, both shaped like its tokens."""
    positions = np.arange(batch.tokens.shape[-1])
    return step.tokens_and_mask(run, batch.tokens, batch.length, positions)


def train(
    run: Run, split: Examples | None, num_steps: int, folder: Path
) -> tuple[list[Any], dict[str, Any]]:
    """Takes the first steps of a run of one seed, or reads those that an earlier call kept.

    Args:
      run: a run of one seed, with the schedule of its whole training.
      split: the training examples.
      num_steps: steps to take.
      folder: where first_steps.npz is kept.

    Returns:
      The model's variables before the first step and after each, and the provenance of the steps.
    """
    states = init_states(run)
    found = [take(jax.device_get(states.variables), 0)]

    setting = grid.setting_of(configs.stored(run.config)) | {"seed": run.config.seed}
    path = folder / "first_steps.npz"
    if path.exists():
        with np.load(path) as arrays:
            kept = {"fixed": {}} | flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
        header = json.loads(str(kept.pop("header")))
        if header["config"] == as_read(setting) and header["steps"] >= num_steps:
            if _close(take(kept, 0), found[0]):
                say(f"{folder.name}: the steps are kept from an earlier call")
                return [take(kept, i) for i in range(num_steps + 1)], header["provenance"]
            say(f"{folder.name}: the kept steps begin with other parameters: starting over")

    train_step = make_train_step(run)
    batches = first_batches(run, split, num_steps)
    for batch in track(batches, num_steps, f"{folder.name}, training", "steps"):
        states, _ = train_step(states, meshes.shard_batch(stack_batches([batch]), run.mesh, axis=1))
        found.append(take(jax.device_get(states.variables), 0))
    header = {"config": setting, "steps": num_steps, "provenance": provenance(1)}
    stacks = jax.tree.map(lambda *x: np.stack(x), *found)
    with replacing(path) as part, part.open("wb") as file:
        flat = flax.traverse_util.flatten_dict(stacks, sep="/")
        np.savez(file, header=json.dumps(header), **flat)
    return found, header["provenance"]


def _close(a: Any, b: Any) -> bool:
    """Returns whether variables of one config are equal up to the rounding of devices."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, atol=1e-6), a, b)))
