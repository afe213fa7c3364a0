"""The first steps of training, with the parameters after each, kept for several scripts."""

import json
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np

import skyformer_jax.config
from experiments.provenance import provenance
from skyformer_jax.data.batches import Batch, stacked, training_batches
from skyformer_jax.data.examples import Examples
from skyformer_jax.models import build_model
from skyformer_jax.progress import say, track
from skyformer_jax.training import compilation, steps
from skyformer_jax.training import mesh as meshes

# With the fields of the config that change none of what is kept.
_NOT_KEPT = (*skyformer_jax.config.MEANS, "data.source")


def first_batches(
    config: ml_collections.ConfigDict, split: Examples, num_steps: int
) -> list[Batch]:
    """The batches of the first steps, as training reads them."""
    batches = training_batches(
        split, config.train.batch_size, config.model.max_length, seed=config.seed
    )
    return [next(batches) for _ in range(num_steps)]


def read(config: ml_collections.ConfigDict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The tokens and the mask that the model sees."""
    places = np.arange(batch.tokens.shape[-1])
    return steps.reading_of(config)(batch.tokens, batch.length, places)


def train(
    config: ml_collections.ConfigDict, split: Examples, num_steps: int, folder: Path
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
    wanted = {
        field: value
        for field, value in skyformer_jax.config.flatten(
            skyformer_jax.config.stored(config)
        ).items()
        if not field.startswith(_NOT_KEPT)
    }
    compilation.use_cache(config.compilation_cache)
    model, optimizer = build_model(config), steps.make_optimizer(config)
    mesh = meshes.make_mesh(1, 1, jax.devices()[:1])
    state = jax.jit(steps.init_states, static_argnums=(1, 2, 3))(
        [config.seed], model, optimizer, steps.token_shape(config)
    )
    state = jax.device_put(state, meshes.replicated(mesh))
    start = steps.take(jax.device_get(state.variables), 0)

    path = folder / "first_steps.npz"
    if path.exists():
        with np.load(path) as kept:
            header = json.loads(str(kept["header"]))
            if header["config"] == json.loads(json.dumps(wanted)) and header["steps"] >= num_steps:
                flat = {tuple(k.split("/")): kept[k] for k in kept.files if k != "header"}
                stacks = flax.traverse_util.unflatten_dict(flat)
                found = [_variables(steps.take(stacks, i)) for i in range(num_steps + 1)]
                if _alike(found[0], start):
                    say(f"{folder.name}: the steps are there")
                    return found, header["provenance"]
                say(f"{folder.name}: kept by code that starts otherwise: begun anew")

    step = steps.train_step_of(config, model, optimizer, mesh)
    found = [start]
    batches = first_batches(config, split, num_steps)
    for batch in track(batches, num_steps, f"{folder.name}, training", "steps"):
        state, _ = step(state, stacked([iter([batch])], 1))
        found.append(steps.take(jax.device_get(state.variables), 0))
    where = provenance(1)
    flat = flax.traverse_util.flatten_dict(jax.tree.map(lambda *x: np.stack(x), *found), sep="/")
    header = {"config": wanted, "steps": num_steps, "provenance": where}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, header=json.dumps(header), **flat)
    part.replace(path)
    return found, where


def _alike(a: Any, b: Any) -> bool:
    """Whether variables of one config are equal, but for what devices round otherwise."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, atol=1e-6), a, b)))


def _variables(stored: dict[str, Any]) -> dict[str, Any]:
    return {"fixed": {}, **stored}
