"""Released checkpoints: made of a run, and evaluated again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from skyformer_jax import pretrained, tasks
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.files import expand
from skyformer_jax.training import checkpoints, compilation_cache, processes
from skyformer_jax.training import config as configs
from skyformer_jax.training.evaluation import (
    describe_data,
    evaluation_mesh,
    measure,
    write_out,
)
from skyformer_jax.training.run import make_run
from skyformer_jax.training.sharded_step import make_predict_step
from skyformer_jax.training.state import TrainState, state_spec
from skyformer_jax.training.workdir import write_json

# Fields of a result that a release keeps of the run's own evaluation.
_OF_RESULT = (
    "task",
    "attention",
    "split",
    "examples",
    "accuracy",
    "interval_95",
    "loss",
    "floors",
    "checkpoint",
    "validation",
    "data",
)


def release(workdir: str | Path, out: str | Path, trained: dict[str, Any]) -> dict[str, Any]:
    """Makes a released checkpoint of the best checkpoint of a finished run.

    Args:
      workdir: the workdir of a run of one seed, with eval_test.json.
      out: the folder to make: parameters.npz, config.json and result.json.
      trained: how it was trained, for result.json.

    Returns:
      What result.json holds.

    Raises:
      UserError: if the run is not finished, its test result is not of its best checkpoint, or it
        has several seeds.
    """
    workdir, out = expand(workdir), expand(out)
    config = configs.read(workdir / "config.json")
    if config.num_seeds > 1:
        raise UserError(f"{workdir} has {config.num_seeds} models; name the folder of one: seed-0")
    try:
        tested = json.loads((workdir / "eval_test.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{workdir} has no eval_test.json; evaluate first: python eval.py --workdir={workdir}"
        ) from None
    directory = workdir / "checkpoints"
    step = checkpoints.find(directory, "best")
    if tested["checkpoint"] != step:
        raise UserError(
            f"{workdir / 'eval_test.json'} is of step {tested['checkpoint']}, and the best "
            f"checkpoint is that of step {step}; evaluate again: python eval.py --workdir={workdir}"
        )
    run = make_run(config, evaluation_mesh(config))
    state, meta = checkpoints.restore(directory, step, state_spec(run))
    out.mkdir(parents=True, exist_ok=True)
    stored = configs.stored(config)
    # Where the data lay, and what computed, is of that machine.
    stored["data"] |= {"dir": "data", "source": ""}
    stored["parallel"] |= {"data": -1}
    result = {
        "step": step,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "test": {name: tested[name] for name in _OF_RESULT if name in tested},
        "trained": {**trained, "steps": config.train.num_steps, "digest": meta["digest"]},
    }
    pretrained.save_parameters(out / pretrained.PARAMETERS, state.variables)
    write_json(out / pretrained.CONFIG, stored)
    write_json(out / pretrained.RESULT, result)
    return result


def evaluate_released(
    folder: str | Path,
    *,
    split: str = "test",
    landmark_draws: int = 0,
    data_dir: str | None = None,
    source: str | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluates a released checkpoint; writes nothing into its folder.

    Args:
      folder: with parameters.npz, config.json and result.json.
      split: "train", "validation" or "test".
      landmark_draws: as evaluate.
      data_dir: where prepared data lie or are put; None means data.
      source: folder or archive of the published data to prepare them from; None downloads or
        generates what data_dir lacks.
      batch_size: as evaluate.
      out: likewise.
      show: likewise.

    Returns:
      As evaluate; with "released", the accuracy that result.json has, where it is of this split of
      the same data.

    Raises:
      UserError: if a file or the data are missing or damaged, or out cannot be written.
    """
    folder = expand(folder)
    one_of("split", split, tasks.SPLITS)
    _, variables = pretrained.load_pretrained(folder)
    config = configs.read(folder / pretrained.CONFIG)
    compilation_cache.use_cache(config.compilation_cache)
    config.data.dir = data_dir or config.data.dir
    config.data.source = source or ""
    run = make_run(config, evaluation_mesh(config))
    examples = run.load_split(split)
    released = _read_result(folder)
    result = {
        "task": config.task,
        "attention": config.attention.name,
        "split": split,
        "examples": len(examples),
        "checkpoint": released["step"],
        "validation": released["test"]["validation"],
        **measure(run, make_predict_step(run), variables, examples, landmark_draws, batch_size),
        "data": describe_data(run, examples),
    }
    tested = released["test"]
    if split == tested["split"] and result["data"]["checksum"] == tested["data"]["checksum"]:
        result["released"] = tested["accuracy"]
    if processes.is_first():
        if show is not None:
            show(result)
        if out is not None:
            write_out(out, split, result)
    return result


def start_from(states: TrainState, folder: str | Path) -> tuple[TrainState, list[str]]:
    """The states before the first step, with the parameters of a released checkpoint.

    Arrays that the checkpoint does not have, or has in another shape, as a head for other classes,
    stay as they are.

    Args:
      states: the states of all seeds, [seeds, ...].
      folder: the folder of the released checkpoint.

    Returns:
      The states, and the names of the arrays that stay as they are.

    Raises:
      UserError: if the checkpoint cannot be read, or has no array of this model.
    """
    _, variables = pretrained.load_pretrained(expand(folder))
    found = traverse_util.flatten_dict(variables["params"], sep="/")
    params = traverse_util.flatten_dict(states.params, sep="/")
    fits = {name: name in found and found[name].shape == x.shape[1:] for name, x in params.items()}
    if not any(fits.values()):
        raise UserError(
            f"train.start_from={folder}: none of its arrays is of this model; its config.json "
            "says which model it is"
        )
    params = {
        name: jnp.broadcast_to(jnp.asarray(found[name], x.dtype), x.shape) if fits[name] else x
        for name, x in params.items()
    }
    kept = [name for name, fit in fits.items() if not fit]
    return states.replace(params=traverse_util.unflatten_dict(params, sep="/")), kept


def _read_result(folder: Path) -> dict[str, Any]:
    path = folder / pretrained.RESULT
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
