"""Checks a config before anything is compiled or written, and reads and stores configs."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

import skyformer_jax
from skyformer_jax import attention, encoder, tasks
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.files import expand
from skyformer_jax.training.data_checks import check_data
from skyformer_jax.training.defaults import added_fields, default_config

# Fields for the location of files, the method of computation and the logging. They do not change
# what is computed, so they may change when a run is restarted; results then agree to rounding.
MUTABLE_FIELDS = (
    "version",
    "data.dir",
    "data.source",  # checkpoints store a checksum of the data instead
    "compilation_cache",
    "attention.implementation",
    "model.remat",
    "train.accumulation",
    "train.log_every",
    "train.non_finite",  # "skip" and "stop" differ only at a step that would stop the run
    "parallel.",
)
BACKENDS = ("shard_map", "pmap")
NON_FINITE = ("stop", "skip")
_SPLIT_LANDMARKS = ("uniform", "strided", "segment_means", "learned")


def check(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Raises a UserError for the first field of the config that is invalid.

    Args:
      config: the complete configuration.
      num_devices: number of devices that the run uses.
    """
    task = tasks.of(config)
    _check_fields(config)
    _check_attention(config)
    _check_model(config, task)
    _check_training(config)
    check_data(config, task)
    _check_devices(config, num_devices)


def _check_fields(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError for an unknown field, or a value of the wrong type."""
    known = default_config(tasks.of(config), config.attention.name)
    for field, value in config.items():
        one_of("config field", field, known)
        _check_type(field, value, known[field])
    for section in ("model", "train", "parallel", "data"):
        for field, value in config[section].items():
            one_of(f"field of config.{section},", field, known[section])
            _check_type(f"{section}.{field}", value, known[section][field])


def _check_type(field: str, value: Any, default: Any) -> None:
    """Raises a UserError unless the value has the type of its default; None may replace ""."""
    allowed = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
    if type(default) is dict or type(value) in allowed or (value is None and default == ""):
        return
    raise UserError(
        f"config.{field} must be {' or '.join(kind.__name__ for kind in allowed)}, "
        f"like the default {default!r}; got {value!r}"
    )


def _check_attention(config: ml_collections.ConfigDict) -> None:
    options = config.attention.to_dict()
    name = one_of("attention", options.pop("name"), attention.NAMES)
    # JAX's strict promotion modes raise for any options, so they are relaxed here. The first call,
    # without options, raises if the attention itself is broken, which is not the config's fault.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        attention.check_options(name, {})
        try:
            attention.check_options(name, options)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"config.attention: {error} (--config=FILE:{name} sets the options of {name})"
            ) from None


def _check_model(config: ml_collections.ConfigDict, task: tasks.Task) -> None:
    model = config.model
    one_of("model.pooling", model.pooling, encoder.POOLINGS)
    one_of("model.dtype", model.dtype, encoder.DTYPES)
    one_of("model.positions", model.positions, encoder.POSITIONS)
    multiple = {"sinusoidal": 2, "sinusoidal_2d": 4}.get(model.positions, 1)
    if model.width % multiple:
        raise UserError(
            f"model.width must be divisible by {multiple} for model.positions={model.positions}; "
            f"got {model.width}"
        )
    if model.positions == "rotary" and model.head_dim % 2:
        raise UserError(
            f"model.head_dim must be even for model.positions=rotary; got {model.head_dim}"
        )
    if model.positions in encoder.SQUARE_POSITIONS:
        try:
            encoder.side_of(model.max_length)
        except ValueError as error:
            raise UserError(f"model.positions={model.positions}: {error}") from None
    lengths = [n for n in model.ngrams if type(n) is int and n > 1]
    if list(model.ngrams) != sorted(set(lengths)):
        raise UserError(
            f"model.ngrams must be ascending lengths of at least 2; got {tuple(model.ngrams)}"
        )
    for field, value in model.items():
        if type(value) is int:
            _check_positive(f"model.{field}", value)
    if not 0 <= model.dropout < 1:
        raise UserError(f"model.dropout must be in [0, 1); got {model.dropout}")
    for field in ("vocab_size", "num_classes"):
        if model[field] < getattr(task, field):
            raise UserError(
                f"model.{field} must be at least {getattr(task, field)} for task {task.name}; "
                f"got {model[field]}"
            )
    if model.num_documents != task.num_documents:
        raise UserError(f"model.num_documents must be {task.num_documents} for task {task.name}")


def _check_training(config: ml_collections.ConfigDict) -> None:
    train = config.train
    one_of("train.non_finite", train.non_finite, NON_FINITE)
    for field in ("num_steps", "batch_size", "eval_every", "log_every"):
        _check_positive(f"train.{field}", train[field])
    _check_positive("num_seeds", config.num_seeds)
    if not 0 <= config.seed < 2**32 - config.num_seeds:
        raise UserError(f"seed must be in 0..{2**32 - 1 - config.num_seeds}; got {config.seed}")
    if not 0 <= train.warmup_steps < train.num_steps:
        raise UserError(
            f"train.warmup_steps must be in 0..{train.num_steps - 1} (train.num_steps - 1); "
            f"got {train.warmup_steps}"
        )
    if train.learning_rate <= 0:
        raise UserError(f"train.learning_rate must be positive; got {train.learning_rate}")
    if train.accumulation < 0:
        raise UserError(
            f"train.accumulation must be a number of microbatches, or 0 to choose it; got "
            f"{train.accumulation}"
        )


def _check_positive(field: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{field} must be at least 1; got {value}")


def _check_devices(config: ml_collections.ConfigDict, num_devices: int) -> None:
    train = config.train
    data, seq = mesh_shape(config, num_devices)
    parts = data * max(1, train.accumulation)
    if train.batch_size % parts:
        by = f"the {num_devices} devices" if seq == 1 else f"parallel.data={data}"
        if train.accumulation > 1:
            by += f" times train.accumulation={train.accumulation}"
        raise UserError(
            f"train.batch_size={train.batch_size} is not divisible by {by}; "
            f"the nearest that is: {max(1, round(train.batch_size / parts)) * parts}"
        )
    if seq > 1:
        _check_split_sequences(config, seq)


def mesh_shape(config: ml_collections.ConfigDict, num_devices: int) -> tuple[int, int]:
    """Returns the numbers of devices along data and along seq that config.parallel asks for.

    Raises:
      UserError: if they do not use all num_devices devices, or the backend does not support them.
    """
    parallel = config.parallel
    one_of("parallel.backend", parallel.backend, BACKENDS)
    data, seq = parallel.data, parallel.seq
    for field, value in (("data", data), ("seq", seq)):
        if value < 1 and value != -1:
            raise UserError(f"parallel.{field} must be at least 1, or -1 for the rest; got {value}")
    if data == seq == -1:
        raise UserError("parallel.data and parallel.seq cannot both be -1")
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


def _check_split_sequences(config: ml_collections.ConfigDict, seq: int) -> None:
    options = config.attention
    if options.name not in attention.SPLITTABLE:
        raise UserError(
            f"parallel.seq={seq} needs an attention that runs on a split sequence: "
            f"{', '.join(attention.SPLITTABLE)}; not {options.name}"
        )
    lengths = [config.model.max_length, *config.data.buckets]
    if config.train.sample_steps:
        lengths.append(config.train.sample_length)
    for length in lengths:
        if length % seq:
            raise UserError(f"parallel.seq={seq} does not divide the padded length {length}")
    if options.name == "skyformer" and options.landmarks not in _SPLIT_LANDMARKS:
        one_of(f"attention.landmarks with parallel.seq={seq},", options.landmarks, _SPLIT_LANDMARKS)
    shortest = min(lengths) // seq
    if options.get("conv_size", 0) // 2 > shortest:
        raise UserError(
            f"attention.conv_size={options.conv_size} reaches beyond the {shortest} positions that "
            f"parallel.seq={seq} leaves to a device"
        )
    longest = max(config.model.ngrams, default=1)
    if longest - 1 > shortest:
        raise UserError(
            f"model.ngrams has {longest}, which reaches beyond the {shortest} positions that "
            f"parallel.seq={seq} leaves to a device"
        )


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the config as nested dicts of JSON values."""
    return json.loads(config.to_json_best_effort())


def stored(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the content of a run's config.json: the package version and the config.

    Paths are absolute, since eval.py may be started in another folder.
    """
    held = to_dict(config)
    for location in ("dir", "source"):
        if held["data"][location]:
            held["data"][location] = str(expand(held["data"][location]).absolute())
    return {"version": skyformer_jax.__version__, **held}


def read(path: Path) -> ml_collections.ConfigDict:
    """Reads the config of a workdir, written by this version or an earlier one.

    Raises:
      UserError: if the file is missing, is not a config, or has fields that this version does not
        know.
    """
    version = "0.1.0"  # which did not store its version
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds no fields, but {content!r:.40}")
        version = content.pop("version", version)
        config = upgrade(content)
        _check_fields(config)
        _check_attention(config)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a workdir of train.py") from None
    except UserError as error:
        raise UserError(
            f"{path} was written by skyformer_jax {version}, and {skyformer_jax.__version__} does "
            f"not read it: {error}"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return config


def upgrade(content: dict[str, Any]) -> ml_collections.ConfigDict:
    """Completes a stored config so that it describes what the version that wrote it computed.

    Fields that were added since get the values that describe the earlier behaviour.
    """
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for section in ("model", "train", "data"):
        content.setdefault(section, {})
    content["train"].pop("steps_per_call", None)  # it did not affect the results
    if content["data"].pop("drop_zeros", False):  # the earlier form of drop_below
        content["data"]["drop_below"] = 1
    for field, value in added_fields(content).items():
        section, _, name = field.partition(".")
        content[section].setdefault(name, value)
    return complete(content)


def complete(config: ml_collections.ConfigDict | dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns a copy of a config with defaults for the fields that it lacks.

    Raises:
      UserError: if the task or the attention is unknown.
    """
    given = ml_collections.ConfigDict(config).to_dict()
    full = default_config(tasks.of(given), given["attention"]["name"])
    for field, value in given.items():
        full[field] = {**full.get(field, {}), **value} if isinstance(value, dict) else value
    return ml_collections.ConfigDict(full)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(
    saved: dict[str, Any], asked: dict[str, Any], may_differ: tuple[str, ...] = MUTABLE_FIELDS
) -> list[str]:
    """Describes each field that differs between two stored configs.

    Args:
      saved: the config of the earlier run.
      asked: the config asked for now.
      may_differ: prefixes of the fields to leave out.

    Returns:
      One text for each field, with both values.
    """
    old, new = flatten(saved), flatten(asked)
    return [
        f"{field} (saved: {old.get(field, 'absent')!r}, asked for: {new.get(field, 'absent')!r})"
        for field in sorted(old.keys() | new.keys())
        if not field.startswith(may_differ) and old.get(field, KeyError) != new.get(field, KeyError)
    ]
