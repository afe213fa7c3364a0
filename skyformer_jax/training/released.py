"""Makes released checkpoints of runs, evaluates them and starts training from them."""

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

# Fields of the run's evaluation that result.json of a release keeps.
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
    """Makes a released checkpoint from the best checkpoint of a finished run.

    Args:
      workdir: the workdir of a run of one seed, with eval_test.json.
      out: the folder to create, for parameters.npz, config.json and result.json.
      trained: JSON values for "trained" in result.json, which says how the model was trained.

    Returns:
      The content of result.json.

    Raises:
      UserError: if there is no test result or it is not of the best checkpoint, or if the run has
        several seeds.
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
    # The data folder, the source and the devices are specific to the machine of the run.
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
      folder: the folder with parameters.npz, config.json and result.json.
      split: "train", "validation" or "test".
      landmark_draws: see evaluate.
      data_dir: the folder of the prepared data; None means that of config.json, "data".
      source: folder or archive with the published data; None downloads or generates what data_dir
        lacks.
      batch_size: see evaluate.
      out: a JSON file, or a folder for eval_<split>.json, to write the result to; None writes none.
      show: see evaluate.

    Returns:
      The result, see evaluate. If result.json is of this split of the same data, "released" is its
      accuracy.

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
    """Replaces the parameters of initial states by those of a released checkpoint.

    Parameters that the checkpoint lacks or has in another shape, such as a head for other classes,
    keep their initial values.

    Args:
      states: the states of all seeds, [seeds, ...].
      folder: the folder of the released checkpoint.

    Returns:
      The states, and the names of the parameters that keep their initial values.

    Raises:
      UserError: if the checkpoint cannot be read, or none of its arrays fits the model.
    """
    _, variables = pretrained.load_pretrained(expand(folder))
    found = traverse_util.flatten_dict(variables["params"], sep="/")
    params = traverse_util.flatten_dict(states.params, sep="/")
    fits = {name: name in found and found[name].shape == x.shape[1:] for name, x in params.items()}
    if not any(fits.values()):
        raise UserError(
            f"train.start_from={folder}: none of its arrays fits this model; its config.json "
            "describes the model that they fit"
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
