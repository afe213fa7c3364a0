"""The first steps of training, with the parameters after each, kept for several scripts."""

import json
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np

import skyformer_jax.config
from experiments.paper import grid
from experiments.records import as_read, provenance, replacing
from skyformer_jax.data.batches import Batch, Examples, stacked, training_batches
from skyformer_jax.models import build_model
from skyformer_jax.progress import say, track
from skyformer_jax.training import compilation, steps
from skyformer_jax.training import mesh as meshes

Config = ml_collections.ConfigDict


def first_batches(config: Config, split: Examples, num_steps: int) -> list[Batch]:
    """The batches of the first steps, as training reads them."""
    batches = training_batches(
        split, config.train.batch_size, config.model.max_length, seed=config.seed
    )
    return [next(batches) for _ in range(num_steps)]


def model_inputs(config: Config, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The tokens, int, and the mask, bool, that the model gets of a batch; shapes as its tokens."""
    positions = np.arange(batch.tokens.shape[-1])
    return steps.reading_of(config)(batch.tokens, batch.length, positions)


def train(
    config: Config, split: Examples | None, num_steps: int, folder: Path
) -> tuple[list[Any], dict[str, Any]]:
    """Trains, on one device, or reads what an earlier call kept.

    Args:
      config: of the run, whose schedule is that of all its steps.
      split: the training examples.
      num_steps: steps to take.
      folder: gets first_steps.npz.

    Returns:
      The model's variables before the first step and after each, and the provenance of the steps.
    """
    compilation.use_cache(config.compilation_cache)
    model, optimizer = build_model(config), steps.make_optimizer(config)
    mesh = meshes.make_mesh(1, 1, jax.devices()[:1])
    state = jax.jit(steps.init_states, static_argnums=(1, 2, 3))(
        [config.seed], model, optimizer, steps.token_shape(config)
    )
    state = jax.device_put(state, meshes.replicated(mesh))
    found = [steps.take(jax.device_get(state.variables), 0)]

    setting = grid.setting_of(skyformer_jax.config.stored(config)) | {"seed": config.seed}
    path = folder / "first_steps.npz"
    if path.exists():
        kept, header = _read(path)
        if header["config"] == as_read(setting) and header["steps"] >= num_steps:
            if _close(kept[0], found[0]):
                say(f"{folder.name}: the steps are there")
                return kept[: num_steps + 1], header["provenance"]
            say(f"{folder.name}: kept by code that starts otherwise: begun anew")

    step = steps.train_step_of(config, model, optimizer, mesh)
    batches = first_batches(config, split, num_steps)
    for batch in track(batches, num_steps, f"{folder.name}, training", "steps"):
        state, _ = step(state, stacked([iter([batch])], 1))
        found.append(steps.take(jax.device_get(state.variables), 0))
    header = {"config": setting, "steps": num_steps, "provenance": provenance(1)}
    stacks = jax.tree.map(lambda *x: np.stack(x), *found)
    with replacing(path) as part, part.open("wb") as file:
        flat = flax.traverse_util.flatten_dict(stacks, sep="/")
        np.savez(file, header=json.dumps(header), **flat)
    return found, header["provenance"]


def _read(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The variables before the first step and after each, and the header of the file."""
    with np.load(path) as kept:
        header = json.loads(str(kept["header"]))
        flat = {name: kept[name] for name in kept.files if name != "header"}
    stacks = {"fixed": {}, **flax.traverse_util.unflatten_dict(flat, sep="/")}
    return [steps.take(stacks, i) for i in range(header["steps"] + 1)], header


def _close(a: Any, b: Any) -> bool:
    """Whether variables of one config are equal, but for what devices round otherwise."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, atol=1e-6), a, b)))
