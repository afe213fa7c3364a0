"""Checks of a configuration, made before anything is compiled or written."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from skyformer_jax import attention, models, tasks
from skyformer_jax.errors import UserError

# Fields that say where things lie, not what is computed: they may differ between two runs of one
# workdir.
LOCATIONS = ("data.dir", "compilation_cache")
_DATA_FIELDS = ("dir", "source", "buckets", "mask_zeros")


def one_of(what: str, got: str, allowed: Iterable[str]) -> str:
    """Returns got if it is allowed, else raises a UserError that says what is."""
    allowed = tuple(allowed)
    if got not in allowed:
        close = difflib.get_close_matches(str(got), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown {what} {got!r}{hint}; choose one of: {', '.join(allowed)}")
    return got


def check(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Raises a UserError for the first thing in the config that cannot work.

    Args:
      config: the complete configuration.
      num_devices: devices that the batch will be divided over.
    """
    task = tasks.get(one_of("task", config.task, tasks.NAMES))
    options = config.attention.to_dict()
    name = one_of("attention", options.pop("name"), attention.NAMES)
    try:
        attention.check_options(name, options)
    except ValueError as error:
        raise UserError(
            f"config.attention: {error} (--config=FILE:{name} sets just what {name} has)"
        ) from None
    one_of("model.pooling", config.model.pooling, models.POOLINGS)
    one_of("model.dtype", config.model.dtype, models.DTYPES)

    model, train = config.model, config.train
    positive = {f"model.{k}": v for k, v in model.items() if type(v) is int}
    counts = ("num_steps", "batch_size", "steps_per_call", "eval_every", "log_every")
    positive |= {f"train.{k}": train[k] for k in counts}
    positive["num_seeds"] = config.num_seeds
    for field, value in positive.items():
        if value < 1:
            raise UserError(f"{field} must be at least 1; got {value}")
    if not 0 <= config.seed < 2**32 - config.num_seeds:
        raise UserError(f"seed must be in 0..{2**32 - 1 - config.num_seeds}; got {config.seed}")
    if not 0 <= model.dropout < 1:
        raise UserError(f"model.dropout must be in [0, 1); got {model.dropout}")
    if not 0 <= train.warmup_steps < train.num_steps:
        raise UserError(
            f"train.warmup_steps must be in 0..{train.num_steps - 1} (train.num_steps - 1); "
            f"got {train.warmup_steps}"
        )
    if train.learning_rate <= 0:
        raise UserError(f"train.learning_rate must be positive; got {train.learning_rate}")
    for field in ("vocab_size", "num_classes"):
        if model[field] < getattr(task, field):
            raise UserError(
                f"model.{field} must be at least {getattr(task, field)} for task {task.name}; "
                f"got {model[field]}"
            )
    _check_data(config, task)
    for field in ("num_steps", "eval_every", "log_every"):
        if train[field] % train.steps_per_call:
            raise UserError(
                f"train.{field}={train[field]} is not a multiple of "
                f"train.steps_per_call={train.steps_per_call}"
            )
    if train.accumulation < 0:
        raise UserError(
            f"train.accumulation must be a number of parts, or 0 for what suits the device; got "
            f"{train.accumulation}"
        )
    parts = num_devices * max(1, train.accumulation)
    if train.batch_size % parts:
        by = f"the {num_devices} devices"
        if train.accumulation > 1:
            by += f" times train.accumulation={train.accumulation}"
        raise UserError(
            f"train.batch_size={train.batch_size} is not divisible by {by}; "
            f"nearest that is: {max(1, round(train.batch_size / parts)) * parts}"
        )


def _check_data(config: ml_collections.ConfigDict, task: tasks.Task) -> None:
    """Raises a UserError for a field of config.data that cannot work."""
    data, max_length = config.data, config.model.max_length
    for field in data:
        one_of(f"field of task {task.name}, data.", field, (*_DATA_FIELDS, *task.options))
    for option in ("length", "shrink"):
        if option in data and not 1 <= data[option] <= task.max_length:
            raise UserError(f"data.{option} must be in 1..{task.max_length}; got {data[option]}")
    longest = task.longest(data)
    if max_length < longest:
        raise UserError(
            f"model.max_length must be at least {longest}, the length of task {task.name} as "
            f"config.data has it; got {max_length}"
        )
    if config.model.num_documents != task.num_documents:
        raise UserError(f"model.num_documents must be {task.num_documents} for task {task.name}")
    if list(data.buckets) != sorted({size for size in data.buckets if 0 < size < max_length}):
        raise UserError(
            "data.buckets must be rising lengths below model.max_length="
            f"{max_length}; got {tuple(data.buckets)}"
        )
    if data.buckets and (config.num_seeds > 1 or config.train.steps_per_call > 1):
        raise UserError(
            "data.buckets needs num_seeds=1 and train.steps_per_call=1, as all batches of a call "
            "have one length"
        )


def single_runs(
    config: ml_collections.ConfigDict, workdir: Path
) -> list[tuple[ml_collections.ConfigDict, Path]]:
    """The runs of one model each that a run consists of, and their workdirs.

    With num_seeds = 1 that is the run itself; else they are seed-0, seed-1, ... in its workdir,
    each just as a run of that seed alone would be.
    """
    if config.get("num_seeds", 1) == 1:
        return [(config, workdir)]
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        one = config.copy_and_resolve_references()
        one.update({"seed": seed, "num_seeds": 1})
        runs.append((one, workdir / f"seed-{seed}"))
    return runs


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain dicts and values, as it is stored."""
    return json.loads(config.to_json_best_effort())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """One text for each field, locations aside, that differs between two stored configs."""
    old, new = flatten(saved), flatten(asked)
    return [
        f"{field} (saved: {old.get(field, 'absent')!r}, asked for: {new.get(field, 'absent')!r})"
        for field in sorted(old.keys() | new.keys())
        if field not in LOCATIONS and old.get(field, KeyError) != new.get(field, KeyError)
    ]


def read(path: Path) -> ml_collections.ConfigDict:
    """The config of a workdir.

    Raises:
      UserError: if the file is missing or is not a config.
    """
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a workdir of train.py") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
