"""Checks of a configuration, made before anything is compiled or written."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from skyformer_jax import attention, models, tasks
from skyformer_jax.errors import UserError

# Fields that say where things lie and what computes, not what is computed: they may differ between
# two runs of one workdir, whose results then agree to rounding.
MEANS = ("data.dir", "compilation_cache", "train.accumulation", "parallel.")
BACKENDS = ("shard_map", "pmap")
NON_FINITE = ("stop", "skip")
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
    one_of("model.positions", config.model.positions, models.POSITIONS)
    one_of("train.non_finite", config.train.non_finite, NON_FINITE)
    if config.model.positions == "sinusoidal" and config.model.width % 2:
        raise UserError(
            f"model.width must be even for model.positions=sinusoidal; got {config.model.width}"
        )

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
    data, seq = mesh_shape(config, num_devices)
    parts = data * max(1, train.accumulation)
    if train.batch_size % parts:
        by = f"the {num_devices} devices" if seq == 1 else f"parallel.data={data}"
        if train.accumulation > 1:
            by += f" times train.accumulation={train.accumulation}"
        raise UserError(
            f"train.batch_size={train.batch_size} is not divisible by {by}; "
            f"nearest that is: {max(1, round(train.batch_size / parts)) * parts}"
        )
    if seq > 1:
        _check_split(config, seq)


def mesh_shape(config: ml_collections.ConfigDict, num_devices: int) -> tuple[int, int]:
    """Devices along data and along seq, as config.parallel has them of that many.

    Raises:
      UserError: if they do not use all devices, or the backend cannot.
    """
    parallel = config.parallel
    one_of("parallel.backend", parallel.backend, BACKENDS)
    data, seq = parallel.data, parallel.seq
    for field, value in (("data", data), ("seq", seq)):
        if value < 1 and value != -1:
            raise UserError(f"parallel.{field} must be at least 1, or -1 for the rest; got {value}")
    if data == seq == -1:
        raise UserError("parallel.data and parallel.seq cannot both be -1, the rest")
    if data == -1 and num_devices % seq == 0:
        data = num_devices // seq
    elif seq == -1 and num_devices % data == 0:
        seq = num_devices // data
    if data * seq != num_devices:
        raise UserError(
            f"parallel.data={parallel.data} times parallel.seq={parallel.seq} is not the number of "
            f"devices, {num_devices}; -1 for one of them means the rest"
        )
    if parallel.backend == "pmap" and seq > 1:
        raise UserError("parallel.backend=pmap has no parallel.seq; use shard_map")
    return data, seq


def _check_split(config: ml_collections.ConfigDict, seq: int) -> None:
    """Raises a UserError for what cannot be with sequences in seq parts."""
    options = config.attention
    if options.name not in attention.SPLITTABLE:
        raise UserError(
            f"parallel.seq={seq} needs an attention that runs on a split sequence: "
            f"{', '.join(attention.SPLITTABLE)}; not {options.name}"
        )
    for length in (config.model.max_length, *config.data.buckets):
        if length % seq:
            raise UserError(f"parallel.seq={seq} does not divide the padded length {length}")
    split_landmarks = ("uniform", "strided", "segment_means")
    if options.name == "skyformer" and options.landmarks not in split_landmarks:
        one_of(f"attention.landmarks with parallel.seq={seq},", options.landmarks, split_landmarks)
    shortest = min((config.model.max_length, *config.data.buckets)) // seq
    if options.get("conv_size", 0) // 2 > shortest:
        raise UserError(
            f"attention.conv_size={options.conv_size} reaches beyond the {shortest} positions that "
            f"parallel.seq={seq} leaves to a device"
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


def stored(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What config.json of a run holds: locations are absolute, eval.py may be called elsewhere."""
    held = to_dict(config)
    for location in ("dir", "source"):
        if held["data"][location]:
            held["data"][location] = str(Path(held["data"][location]).expanduser().absolute())
    return held


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
    """One text for each field, MEANS aside, that differs between two stored configs."""
    old, new = flatten(saved), flatten(asked)
    return [
        f"{field} (saved: {old.get(field, 'absent')!r}, asked for: {new.get(field, 'absent')!r})"
        for field in sorted(old.keys() | new.keys())
        if not field.startswith(MEANS) and old.get(field, KeyError) != new.get(field, KeyError)
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
