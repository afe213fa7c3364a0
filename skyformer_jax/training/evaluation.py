"""Evaluates each example of a split once; metrics are computed on the host in float64."""

import collections
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from skyformer_jax import tasks
from skyformer_jax.attention import REGISTRY
from skyformer_jax.data import store
from skyformer_jax.data.batches import evaluation_batches
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.files import expand
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, compilation_cache, processes, results
from skyformer_jax.training import config as configs
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training.run import Run, make_run
from skyformer_jax.training.sharded_step import PredictStep, make_predict_step
from skyformer_jax.training.state import TrainState, state_spec
from skyformer_jax.training.workdir import (
    NOT_PREDICTING,
    SeedRun,
    check_trained_as,
    seed_runs,
    write_json,
)

# Batches whose logits may be pending on the devices.
_IN_FLIGHT = 8


class Evaluation(NamedTuple):
    """The result of an evaluation, and the files to write it to.

    Attributes:
      result: the result; for several seeds, a summary.
      files: the content of each file of the workdir, by path.
    """

    result: dict[str, Any]
    files: dict[Path, dict[str, Any]]

    def write(self) -> None:
        """Writes the files."""
        for path, content in self.files.items():
            write_json(path, content)


def evaluate(
    workdir: str | Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    landmark_draws: int = 0,
    data_dir: str | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a workdir and writes eval_<split>.json into it.

    For a run of several seeds it evaluates one checkpoint of each seed, and writes
    eval_<split>.json into the folder of each seed and a summary into the workdir. If the files
    cannot be written, it prints a line that says so.

    Args:
      workdir: the folder of the run, with its config and checkpoints.
      split: "train", "validation" or "test".
      checkpoint: "best" by validation accuracy, "latest", or a step in digits.
      landmark_draws: number of additional evaluations with randomly drawn landmarks, as in the
        published code. The result has the mean and standard deviation of their accuracies.
      data_dir: the folder of the prepared data; None means that of training.
      batch_size: None means that of training. It is rounded up to a multiple of the devices along
        "data", and does not change the result.
      out: a JSON file, or a folder for eval_<split>.json, to write the result to instead of the
        workdir.
      show: called with the result before it is written, on the first process only.

    Returns:
      The content of the file: accuracy and interval in 0..1, loss in nats,
      confusion[label][prediction], accuracy of each class, floors, seconds, checkpoint, config
      digest, and a description of the data. For several seeds: mean and standard deviation of the
      accuracy, mean loss, floors, and under "seeds" the results of each seed.

    Raises:
      UserError: if the workdir, the checkpoint or the data are missing or damaged, or out cannot be
        written.
    """
    workdir = expand(workdir)
    config = configs.read(workdir / "config.json")
    compilation_cache.use_cache(config.compilation_cache)
    if data_dir:
        config.data.dir = data_dir
    run = make_run(config, evaluation_mesh(config))
    evaluation = evaluate_run(
        run,
        workdir,
        make_predict_step(run),
        split=split,
        checkpoint=checkpoint,
        landmark_draws=landmark_draws,
        batch_size=batch_size,
    )
    if processes.is_first():
        if show is not None:
            show(evaluation.result)
        if out is not None:
            write_out(out, split, evaluation.result)
        else:
            _write_or_say(workdir, evaluation)
    return evaluation.result


def write_out(out: str | Path, split: str, result: dict[str, Any]) -> None:
    """Writes a result to out: a JSON file, or a folder for eval_<split>.json."""
    path = expand(out)
    try:
        if str(out).endswith("/") or path.is_dir():  # a Path drops the trailing slash
            path = path / f"eval_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; name another") from None


def _write_or_say(workdir: Path, evaluation: Evaluation) -> None:
    """Writes the result into a workdir, or prints a line if that fails."""
    try:
        evaluation.write()
    except OSError as error:
        names = " and ".join(dict.fromkeys(path.name for path in evaluation.files))
        say(
            f"{names} is not written into {workdir} ({error.strerror}); --out=FILE.json writes it "
            "elsewhere"
        )


def evaluation_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
    """Returns the mesh of training if the devices allow it; otherwise all devices on "data"."""
    try:
        return meshes.make_mesh(*configs.mesh_shape(config, jax.device_count()))
    except UserError:
        return meshes.make_mesh()


def evaluate_run(
    run: Run,
    workdir: Path,
    predict_step: PredictStep,
    *,
    split: str = "test",
    checkpoint: str = "best",
    landmark_draws: int = 0,
    batch_size: int | None = None,
) -> Evaluation:
    """Evaluates like evaluate, with an already compiled prediction; writes nothing."""
    one_of("split", split, tasks.SPLITS)
    attention = run.config.attention.name
    if landmark_draws and REGISTRY[attention].stream != "landmarks":
        raise UserError(f"attention {attention!r} draws no landmarks; leave out landmark_draws")
    seeds = seed_runs(run.config, workdir)
    restored = [_restore(run, one, checkpoint) for one in seeds]
    examples = run.load_split(split)
    of_seeds, files = {}, {}
    for one, (step, state, meta) in zip(seeds, restored, strict=True):
        result = {
            "task": run.config.task,
            "attention": attention,
            "split": split,
            "examples": len(examples),
            "checkpoint": step,
            "validation": meta["validation"],
            **measure(run, predict_step, state.variables, examples, landmark_draws, batch_size),
            "config_digest": results.config_digest(one.config),
            "data": describe_data(run, examples),
        }
        of_seeds[one.config.seed] = files[one.workdir / f"eval_{split}.json"] = result
    if len(seeds) > 1:
        result = files[workdir / f"eval_{split}.json"] = results.summarise(of_seeds)
    return Evaluation(result, files)


def _restore(run: Run, one: SeedRun, checkpoint: str) -> tuple[int, TrainState, dict[str, Any]]:
    """Restores step, state and meta of a checkpoint, the same on all processes."""
    with processes.barrier():
        step = processes.broadcast(checkpoints.find(one.checkpoints, checkpoint))
        assert step is not None  # find raises if there is none
    with processes.barrier():
        check_trained_as(one, checkpoints.read_meta(one.checkpoints, step), NOT_PREDICTING)
        state, meta = checkpoints.restore(one.checkpoints, step, state_spec(run))
    return step, state, meta


def measure(
    run: Run,
    predict_step: PredictStep,
    variables: Any,
    examples: Examples,
    landmark_draws: int,
    batch_size: int | None,
) -> dict[str, Any]:
    """Computes the metrics of one model on a split."""
    start = time.perf_counter()
    variables = jax.tree.map(lambda x: np.asarray(x)[None], variables)
    variables = jax.device_put(variables, meshes.replicated(run.mesh))
    (logits,) = predict(run, predict_step, variables, examples, batch_size=batch_size)
    seconds = time.perf_counter() - start

    drawn = []
    for draw in range(landmark_draws):
        # No buckets, since drawn landmarks depend on the padded length.
        (redrawn,) = predict(
            run,
            predict_step,
            variables,
            examples,
            batch_size=batch_size,
            rng=jax.random.key(draw),
            buckets=(),
        )
        drawn.append(score(redrawn, examples.label)["accuracy"])

    scores = score(logits, examples.label)
    confusion = np.zeros((run.config.model.num_classes,) * 2, int)
    np.add.at(confusion, (examples.label, logits.argmax(axis=1)), 1)
    figures: dict[str, Any] = {
        "accuracy": scores["accuracy"],
        "interval_95": results.wilson_interval(scores["accuracy"], len(examples)),
        "loss": round(scores["loss"], 6),  # further digits depend on the batch size
        "floors": run.task.floors(examples),
        "per_class_accuracy": [
            row[i] / row.sum() if row.sum() else None for i, row in enumerate(confusion)
        ],
        "confusion": confusion.tolist(),
        "seconds": round(seconds, 2),
    }
    if drawn:
        figures["landmark_draws"] = {
            "accuracies": drawn,
            "mean": float(np.mean(drawn)),
            "standard_deviation": float(np.std(drawn, ddof=1)) if len(drawn) > 1 else None,
        }
    return figures


def describe_data(run: Run, examples: Examples) -> dict[str, Any]:
    """Describes the examples of a split: the data set, its origin and the checksum."""
    data = run.config.data
    builder = run.task.data_set(data.dir, source=data.source or None, kind=data.kind)
    return {**store.describe(builder), "checksum": examples.checksum()}


def predict(
    run: Run,
    predict_step: PredictStep,
    variables: Any,
    examples: Examples,
    *,
    batch_size: int | None = None,
    rng: jax.Array | None = None,
    buckets: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Computes the logits of all examples, float32 [seeds, examples, classes], in order.

    Args:
      run: the run.
      predict_step: the compiled prediction of the run.
      variables: the variables of the run's states, [seeds, ...].
      examples: the split.
      batch_size: None means that of training; rounded up to a multiple of the devices along "data".
        Batch size and padding do not change the result.
      rng: key for drawing landmarks; None is deterministic.
      buckets: lengths to pad to; None means config.data.buckets.
    """
    config, shards = run.config, meshes.local_shards(run.mesh)
    batch_size = (
        -(-(batch_size or config.train.batch_size) // shards.num_shards) * shards.num_shards
    )
    batches = evaluation_batches(
        examples,
        batch_size,
        config.model.max_length,
        buckets=config.data.buckets if buckets is None else buckets,
        shards=shards,
    )
    in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()
    order, done = [], []

    def fetch_oldest() -> None:
        count, logits = in_flight.popleft()
        done.append(np.asarray(logits)[:, :count])

    for rows, local_rows, host_batch in batches:
        order.append(rows)
        batch = meshes.shard_batch(host_batch, run.mesh)
        row_numbers = meshes.shard_batch(local_rows, run.mesh)
        in_flight.append((len(rows), predict_step(variables, batch, rng, row_numbers)))
        if len(in_flight) > _IN_FLIGHT:
            fetch_oldest()
    while in_flight:
        fetch_oldest()
    return np.concatenate(done, axis=1)[:, np.argsort(np.concatenate(order))]


def score(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Computes the mean cross-entropy in nats and the accuracy in 0..1.

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
