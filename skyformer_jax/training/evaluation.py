"""Evaluation: every example once, reduced on the host in float64."""

import collections
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import skyformer_jax.config
from skyformer_jax import tasks
from skyformer_jax.attention import REGISTRY
from skyformer_jax.data import store
from skyformer_jax.data.batches import Batch, evaluation_batches, padded_length
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError, full_disk
from skyformer_jax.models import build_model
from skyformer_jax.training import checkpoints, compilation, processes, steps
from skyformer_jax.training import mesh as meshes

# Batches whose results may be outstanding on the devices at a time.
_IN_FLIGHT = 8


def load_split(config: ml_collections.ConfigDict, split: str) -> Examples:
    """The examples of a split as the config's task gives them.

    Raises:
      UserError: as the task's load; or if one is longer than model.max_length.
    """
    task = tasks.get(config.task)
    options = {option: config.data[option] for option in task.options if option in config.data}
    with full_disk(config.data.dir):  # the first use prepares the data
        examples = task.load(split, config.data.dir, source=config.data.source or None, **options)
    padded_length(int(examples.lengths.max()), config.model.max_length, ())
    return examples


def predict(
    predict_step: Callable[..., jax.Array],
    variables: Any,
    batches: Iterable[tuple[np.ndarray, np.ndarray, Batch]],
    mesh: jax.sharding.Mesh,
    rng: jax.Array | None = None,
) -> np.ndarray:
    """Logits of all examples, float32 [seeds, examples, classes], in their order.

    Args:
      predict_step: of steps.make_predict_step.
      variables: of the TrainState of one or several models, along a first axis.
      batches: of batches.evaluation_batches, those parts of them that this process's devices take;
        size and padding do not change the result.
      mesh: of the devices.
      rng: draws landmarks; None is deterministic.
    """
    outstanding, order, done = collections.deque(), [], []

    def fetch() -> None:
        count, some = outstanding.popleft()
        done.append(np.asarray(some)[:, :count])

    for rows, places, batch in batches:
        order.append(rows)
        batch, places = meshes.shard_batch(batch, mesh), meshes.shard_batch(places, mesh)
        outstanding.append((len(rows), predict_step(variables, batch, rng, places)))
        if len(outstanding) > _IN_FLIGHT:
            fetch()
    while outstanding:
        fetch()
    return np.concatenate(done, axis=1)[:, np.argsort(np.concatenate(order))]


def score(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy in nats and accuracy in 0..1.

    Args:
      logits: [examples, classes].
      label: int [examples].
    """
    logits = logits.astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    losses = log_sum - logits[np.arange(len(label)), label]
    return {
        "loss": float(losses.mean()),
        "accuracy": float((logits.argmax(axis=1) == label).mean()),
    }


def wilson_interval(accuracy: float, examples: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    z = 1.959964
    centre = accuracy + z * z / (2 * examples)
    half = z * math.sqrt(accuracy * (1 - accuracy) / examples + (z / (2 * examples)) ** 2)
    return (centre - half) / (1 + z * z / examples), (centre + half) / (1 + z * z / examples)


def evaluate(
    workdir: str | Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    landmark_draws: int = 0,
    data_dir: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes eval_<split>.json into its workdir.

    For a run of several seeds, one of each, into its own folder, and a summary into the workdir.

    Args:
      workdir: of the run; nothing else is needed.
      split: "train", "validation" or "test".
      checkpoint: "best" by validation accuracy, "latest", or a step.
      landmark_draws: evaluate as many times more with landmarks drawn at random, as the published
        code does, and report mean and standard deviation of those accuracies.
      data_dir: where the data lie, if not where they lay in training.
      batch_size: None means that of training; rounded up to a multiple of the devices along data.

    Returns:
      What the file holds: accuracy and interval in 0..1, loss in nats,
      confusion[label][prediction], accuracy of each class, floors, seconds, checkpoint and
      config digest, and what the data were. Of several seeds: mean and standard deviation of the
      accuracy, mean loss, floors, and under "seeds" the figures of each.

    Raises:
      UserError: if the workdir, the checkpoint or the data are not there or damaged.
    """
    workdir = Path(workdir)
    config = skyformer_jax.config.read(workdir / "config.json")
    runs = skyformer_jax.config.single_runs(config, workdir)
    if len(runs) > 1:
        results = {
            one.seed: evaluate(
                run,
                split=split,
                checkpoint=checkpoint,
                landmark_draws=landmark_draws,
                data_dir=data_dir,
                batch_size=batch_size,
            )
            for one, run in runs
        }
        summary = _summary(results)
        _write(workdir / f"eval_{split}.json", summary)
        return summary
    compilation.use_cache(config.get("compilation_cache", ""))
    if data_dir:
        config.data.dir = data_dir
    skyformer_jax.config.one_of("split", split, tasks.SPLITS)
    if landmark_draws and REGISTRY[config.attention.name].stream != "landmarks":
        raise UserError(f"attention {config.attention.name!r} draws nothing that could be redrawn")
    directory = workdir / "checkpoints"
    with processes.together():
        step = processes.of_first(checkpoints.find(directory, checkpoint))
    mesh = _mesh(config)
    model = build_model(config, axis_name=meshes.sequence_axis(mesh))
    abstract_state = steps.abstract_state(config, model, steps.make_optimizer(config))
    with processes.together():
        state, meta = checkpoints.restore(directory, step, abstract_state)
    task = tasks.get(config.task)
    examples = load_split(config, split)

    part = meshes.part_of_process(mesh)
    batch_size = -(-(batch_size or config.train.batch_size) // part.count) * part.count
    max_length = config.model.max_length
    predict_step = steps.make_predict_step(model, mesh, steps.reading_of(config))
    start = time.perf_counter()
    batches = evaluation_batches(
        examples, batch_size, max_length, buckets=config.data.get("buckets", ()), shards=part
    )
    variables = jax.tree.map(lambda x: np.asarray(x)[None], state.variables)
    variables = jax.device_put(variables, meshes.replicated(mesh))
    logits = predict(predict_step, variables, batches, mesh)[0]
    seconds = time.perf_counter() - start

    def redrawn_accuracy(draw: int) -> float:
        # Without buckets, as draws depend on the padded length.
        batches = evaluation_batches(examples, batch_size, max_length, shards=part)
        logits = predict(predict_step, variables, batches, mesh, jax.random.key(draw))[0]
        return score(logits, examples.label)["accuracy"]

    drawn = [redrawn_accuracy(draw) for draw in range(landmark_draws)]

    scores = score(logits, examples.label)
    confusion = np.zeros((config.model.num_classes,) * 2, int)
    np.add.at(confusion, (examples.label, logits.argmax(axis=1)), 1)
    result = {
        "task": config.task,
        "attention": config.attention.name,
        "split": split,
        "examples": len(examples.label),
        "checkpoint": step,
        "validation": meta["validation"],
        "accuracy": scores["accuracy"],
        "interval_95": wilson_interval(scores["accuracy"], len(examples.label)),
        "loss": round(scores["loss"], 6),  # further digits depend on the batch size
        "floors": task.floors(examples),
        "per_class_accuracy": [
            row[i] / row.sum() if row.sum() else None for i, row in enumerate(confusion)
        ],
        "confusion": confusion.tolist(),
        "seconds": round(seconds, 2),
        "config_digest": config_digest(config),
        "data": {
            **store.describe(task.data_set(config.data.dir, source=config.data.source or None)),
            "checksum": examples.checksum(),
        },
    }
    if drawn:
        result["landmark_draws"] = {
            "accuracies": drawn,
            "mean": float(np.mean(drawn)),
            "standard_deviation": float(np.std(drawn, ddof=1)) if len(drawn) > 1 else None,
        }
    _write(workdir / f"eval_{split}.json", result)
    return result


def _mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
    """That of training where these devices allow it, else all of them along data."""
    if "parallel" not in config:  # as runs of the time before had it
        return meshes.make_mesh()
    try:
        return meshes.make_mesh(*skyformer_jax.config.mesh_shape(config, jax.device_count()))
    except UserError:
        return meshes.make_mesh()


def _write(path: Path, result: dict[str, Any]) -> None:
    if not processes.is_first():
        return
    partial = path.with_suffix(".json.tmp")
    with full_disk(path.parent):
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)


def _summary(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the results of several seeds have in common, their means and their spread."""
    of_seeds = list(results.values())
    accuracies = [result["accuracy"] for result in of_seeds]
    return {
        **{k: of_seeds[0][k] for k in ("task", "attention", "split", "examples", "floors", "data")},
        "accuracy": float(np.mean(accuracies)),
        "standard_deviation": float(np.std(accuracies, ddof=1)),
        "loss": float(np.mean([result["loss"] for result in of_seeds])),
        "seconds": round(sum(result["seconds"] for result in of_seeds), 2),
        "seeds": {
            str(seed): {k: result[k] for k in ("accuracy", "loss", "checkpoint", "validation")}
            for seed, result in results.items()
        },
    }


def config_digest(config: ml_collections.ConfigDict) -> str:
    """First 16 digits of the SHA-256 of the config without what MEANS names."""
    flat = skyformer_jax.config.flatten(skyformer_jax.config.to_dict(config))
    flat = {k: v for k, v in flat.items() if not k.startswith(skyformer_jax.config.MEANS)}
    flat["data.source"] = bool(flat["data.source"])  # published, or generated or downloaded
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def table(result: dict[str, Any]) -> str:
    """The result of evaluate as a person reads it."""
    if "seeds" in result:
        return _summary_table(result)
    low, high = result["interval_95"]
    lines = [
        f"{result['task']} {result['split']}, {result['examples']:,} examples, "
        f"{result['attention']}, checkpoint of step {result['checkpoint']}",
        f"  {'accuracy':<28}{100 * result['accuracy']:6.2f} %   "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f})",
    ]
    for floor, accuracy in result["floors"].items():
        lines.append(f"  {'floor: ' + floor:<28}{100 * accuracy:6.2f} %")
    lines.append(f"  {'loss':<28}{result['loss']:6.4f} nats")
    classes = "  ".join(
        f"{i}: {'-' if a is None else f'{100 * a:.0f} %'}"
        for i, a in enumerate(result["per_class_accuracy"])
    )
    lines.append(f"  accuracy of each class      {classes}")
    if "landmark_draws" in result:
        draws = result["landmark_draws"]
        spread = draws["standard_deviation"]
        lines.append(
            f"  {len(draws['accuracies'])} draws of landmarks".ljust(30)
            + f"{100 * draws['mean']:6.2f} % mean"
            + ("" if spread is None else f", standard deviation {100 * spread:.2f}")
        )
    lines.append(f"  {'evaluated in':<28}{result['seconds']:6.2f} s")
    return "\n".join(lines)


def _summary_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['task']} {result['split']}, {result['examples']:,} examples, "
        f"{result['attention']}, {len(result['seeds'])} seeds",
        f"  {'accuracy':<28}{100 * result['accuracy']:6.2f} %   "
        f"(standard deviation {100 * result['standard_deviation']:.2f})",
    ]
    for seed, one in result["seeds"].items():
        lines.append(
            f"  {'seed ' + seed:<28}{100 * one['accuracy']:6.2f} %   "
            f"(checkpoint of step {one['checkpoint']})"
        )
    for floor, accuracy in result["floors"].items():
        lines.append(f"  {'floor: ' + floor:<28}{100 * accuracy:6.2f} %")
    lines.append(f"  {'loss':<28}{result['loss']:6.4f} nats")
    lines.append(f"  {'evaluated in':<28}{result['seconds']:6.2f} s")
    return "\n".join(lines)
