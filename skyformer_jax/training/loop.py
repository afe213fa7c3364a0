"""The training loop: from a config and a workdir to an evaluated model, interruptions included."""

import collections
import contextlib
import fcntl
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import skyformer_jax.config
from skyformer_jax.data.batches import (
    Examples,
    evaluation_batches,
    stacked,
    training_batches,
    training_rows,
)
from skyformer_jax.errors import UserError
from skyformer_jax.models import build_model
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, compilation, evaluation, logs, steps

# Steps that may be dispatched and not finished: enough to keep a device busy, few enough that
# stopping is prompt and their batches fit.
_IN_FLIGHT = 8


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any] | None:
    """Trains to the end, goes on where an earlier run in the workdir stopped, then evaluates.

    Args:
      config: as the files in configs/ build it.
      workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/, learning_curve.png and
        eval_test.json; with num_seeds above 1 its folders seed-0, ... get these, each what a run
        of that seed alone would make, and it gets config.json and a summary, eval_test.json.

    Returns:
      What evaluate returns for the best checkpoint on the test split; None if a signal stopped
      the run before its end.

    Raises:
      UserError: for a config, data or a workdir that cannot work, or if a loss is not finite.
    """
    workdir = Path(workdir)
    skyformer_jax.config.check(config, jax.device_count())
    compilation.use_cache(config.compilation_cache)
    model, optimizer, mesh = build_model(config), steps.make_optimizer(config), steps.make_mesh()
    abstract_state = steps.abstract_state(config, model, optimizer, mesh)
    with _open_workdirs(workdir, config, abstract_state):
        splits = tuple(evaluation.load_split(config, split) for split in ("train", "validation"))
        with _stop_signals() as stop:
            step = _run(config, workdir, model, optimizer, mesh, abstract_state, splits, stop)
        if step < config.train.num_steps:
            say(f"stopped after step {step}; saved. Start the same command to go on.")
            return None
        result = evaluation.evaluate(workdir)
        for _, run in skyformer_jax.config.single_runs(config, workdir):
            logs.plot_learning_curve(run, result["floors"])
        _print_summary(workdir, result)
        return result


def _run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    model: Any,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    abstract_state: steps.TrainState,
    splits: tuple[Examples, Examples],
    stop: list[int],
) -> int:
    """Steps from the newest checkpoint to the end or to a signal; returns the last step taken."""
    settings = config.train
    train_split, validation_split = splits
    runs = skyformer_jax.config.single_runs(config, workdir)
    seeds = [one.seed for one, _ in runs]
    directories = [run / "checkpoints" for _, run in runs]
    restored = checkpoints.restore_latest(directories, abstract_state)
    replicated = NamedSharding(mesh, P())
    if restored is None:
        init = jax.jit(steps.init_states, static_argnums=(1, 2, 3), out_shardings=replicated)
        states = init(seeds, model, optimizer, steps.token_shape(config))
        step = 0
        say(
            f"training {config.attention.name} on {config.task}: {len(train_split.label):,} "
            f"examples, {settings.num_steps:,} steps of {settings.batch_size}, "
            f"{sum(p.size for p in jax.tree.leaves(states.params)) // len(seeds):,} parameters, "
            f"{mesh.size} {jax.devices()[0].platform} device(s)"
            + (f", {len(seeds)} seeds at once" if len(seeds) > 1 else "")
        )
    else:
        found, step = restored
        states = jax.jit(steps.stack, out_shardings=replicated)(found)
        say(f"going on from the checkpoint of step {step}")
    if step == settings.num_steps:
        return step

    reading = evaluation.reading(config)
    train_step = steps.make_train_step(
        model,
        optimizer,
        mesh,
        settings.log_every,
        reading,
        settings.accumulation,
        steps.token_shape(config),
    )
    # Calls of several steps read the data on the device, where there is room for them.
    table = steps.make_table(train_split, mesh) if settings.steps_per_call > 1 else None
    predict_step = steps.make_predict_step(model, mesh, reading)
    schedule = steps.learning_rate_schedule(config)
    run_logs = [logs.MetricsLog(run, step) for _, run in runs]
    progress = logs.Progress(step, settings.num_steps)
    outstanding = collections.deque()  # (step, its sums, still on their way)
    clock = _Clock(step)
    compiled = set()  # shapes of batches

    def finish_one() -> None:
        done, sums = outstanding.popleft()
        jax.block_until_ready(sums)
        progress.step(done)
        if done % settings.log_every and done != settings.num_steps:
            return
        sums = jax.device_get(sums)
        losses, accuracies = sums["loss"] / sums["examples"], sums["correct"] / sums["examples"]
        for loss, seed, directory in zip(losses, seeds, directories, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the training loss is {loss} at step {done}, seed {seed}; the last good "
                    f"checkpoint is kept in {directory}; lower train.learning_rate"
                )
        lap = clock.lap(done)
        rate = lap.pop("steps_per_second") * settings.batch_size
        progress.metrics(
            done,
            loss=float(losses.mean()),
            accuracy=float(accuracies.mean()),
            rate=rate * len(seeds),
        )
        for log, loss, accuracy in zip(run_logs, losses, accuracies, strict=True):
            log.write(
                done,
                "train",
                loss=float(loss),
                accuracy=float(accuracy),
                learning_rate=float(schedule(done - 1)),
                examples_per_second=rate,
                **lap,
            )

    def validate() -> list[dict[str, float]]:
        batches = evaluation_batches(
            validation_split, settings.batch_size, config.model.max_length, buckets=buckets
        )
        logits = evaluation.predict(predict_step, states.variables, batches, mesh)
        scores = [evaluation.score(of_seed, validation_split.label) for of_seed in logits]
        for log, score in zip(run_logs, scores, strict=True):
            log.write(step, "validation", **score)
        mean = {k: sum(score[k] for score in scores) / len(scores) for k in scores[0]}
        say(
            f"step {step}/{settings.num_steps}  validation loss {mean['loss']:.4f}  "
            f"accuracy {mean['accuracy']:.4f}"
        )
        return scores

    def save(validations: list[dict[str, float] | None]) -> None:
        for i, (one, validation) in enumerate(zip(runs, validations, strict=True)):
            meta = {
                "step": step,
                "examples_read": step * settings.batch_size,
                "validation": validation,
                "config": skyformer_jax.config.to_dict(one[0]),
            }
            checkpoints.save(managers[i], steps.take(states, i), meta)

    buckets = config.data.get("buckets", ())
    process = jax.process_index(), jax.process_count()
    if table is None:
        streams = [
            training_batches(
                train_split,
                settings.batch_size,
                config.model.max_length,
                seed=seed,
                first_step=step,
                buckets=buckets,
                process=process,
            )
            for seed in seeds
        ]
    else:
        index, count = process
        streams = [
            (
                np.split(rows, count)[index]
                for rows in training_rows(
                    len(train_split), settings.batch_size, seed=seed, first_step=step
                )
            )
            for seed in seeds
        ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disk_errors(directories[0].parent))
        stack.enter_context(contextlib.closing(progress))
        for log in run_logs:
            stack.enter_context(contextlib.closing(log))
        managers = [stack.enter_context(checkpoints.open_manager(d)) for d in directories]
        while step < settings.num_steps:
            with clock.input():
                batch = steps.shard_batch(stacked(streams, settings.steps_per_call), mesh, axis=2)
            shape = jax.tree.leaves(batch)[0].shape
            with contextlib.nullcontext() if shape in compiled else clock.compiling():
                states, sums = train_step(states, batch, table)
            compiled.add(shape)
            step += settings.steps_per_call
            outstanding.append((step, sums))
            due = step % settings.eval_every == 0 or step == settings.num_steps
            while outstanding and (due or stop or len(outstanding) > _IN_FLIGHT):
                finish_one()
            if due:
                with clock.paused():
                    save(validate())
            if stop:
                if not due:
                    save([None] * len(seeds))
                break
    return step


class _Clock:
    """Steps per second since the last question, leaving out what is paused or compiled."""

    def __init__(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()
        self._input = self._compile = 0.0

    def lap(self, step: int) -> dict[str, float]:
        """Since the last lap: steps_per_second, and the share of the time that input took.

        Where something was compiled, compile_seconds says how long that took.
        """
        now = time.perf_counter()
        elapsed = now - self._start
        found = {
            "steps_per_second": (step - self._step) / elapsed,
            "input_share": self._input / elapsed,
        }
        if self._compile:
            found["compile_seconds"] = self._compile
        self._step, self._start = step, now
        self._input = self._compile = 0.0
        return found

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Counts its block as input; the devices may be busy with earlier steps meanwhile."""
        begin = time.perf_counter()
        yield
        self._input += time.perf_counter() - begin

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Leaves its block, the first call of a program, out, and says how long it took."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._compile += seconds
        self._start += seconds
        say(f"the training step compiled in {seconds:.1f} s")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves its block out."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that a first SIGTERM or SIGINT fills; a second one acts as it would without us."""
    received: list[int] = []
    old = {}

    def receive(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, old[number])
        say(f"{signal.Signals(number).name}: stopping after the current step")

    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turns a failed write of a checkpoint, which Orbax raises in many shapes, into one line."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if any(word in text for word in ("No space left", "ENOSPC", "EDQUOT", "Quota exceeded")):
            raise UserError(
                f"the disk of {directory} is full; finished checkpoints are kept: free some space "
                "and start the same command to go on"
            ) from error
        raise


def _check_disk(workdir: Path, num_runs: int, abstract_state: steps.TrainState) -> None:
    """Raises a UserError where the checkpoints of a run would not fit."""
    # Three checkpoints kept, and one being written.
    needed = 4 * num_runs * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
    needed += 16 << 20
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of {workdir} has {free / 2**20:,.0f} MiB free; a run of this config "
            f"needs {needed / 2**20:,.0f} MiB: free some space or name another --workdir"
        )


@contextlib.contextmanager
def _open_workdirs(
    workdir: Path, config: ml_collections.ConfigDict, abstract_state: steps.TrainState
) -> Iterator[None]:
    """Makes or checks the workdir, and those of its seeds, and holds them against other runs."""
    runs = skyformer_jax.config.single_runs(config, workdir)
    _check_disk(workdir, len(runs), abstract_state)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_open_workdir(workdir, config))
        for one, run in runs:
            if run != workdir:
                stack.enter_context(_open_workdir(run, one))
        yield


@contextlib.contextmanager
def _open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Holds one workdir, whose config binds once it or its seeds have checkpoints."""
    for parent in (workdir, *workdir.parents):
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--workdir={workdir}: {parent} is a file; name a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {workdir}") from None
        path = workdir / "config.json"
        asked = skyformer_jax.config.to_dict(config)
        for location in ("dir", "source"):  # eval.py may be called from elsewhere
            if asked["data"][location]:
                absolute = Path(asked["data"][location]).expanduser().absolute()
                asked["data"][location] = str(absolute)
        begun = any(
            checkpoints.steps(p / "checkpoints") for p in (workdir, *workdir.glob("seed-*"))
        )
        if begun and not path.exists():
            raise UserError(f"{workdir} has checkpoints but no config.json; name another --workdir")
        if begun:  # else nothing depends on the config of an earlier attempt
            saved = skyformer_jax.config.to_dict(skyformer_jax.config.read(path))
            different = skyformer_jax.config.differences(saved, asked)
            if different:
                raise UserError(
                    f"{workdir} holds a run of another config; name another --workdir, or restore: "
                    + "; ".join(different)
                )
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(asked, indent=1) + "\n")
        partial.replace(path)
        yield


def _print_summary(workdir: Path, result: dict[str, Any]) -> None:
    print(evaluation.table(result))
    if "seeds" in result:
        print(f"\neach seed         {workdir}/seed-*: checkpoints, metrics, learning curve")
    else:
        validation = result["validation"]
        print(
            f"\nbest checkpoint   {workdir}/checkpoints/{result['checkpoint']} "
            f"(validation accuracy {100 * validation['accuracy']:.2f} %)\n"
            f"metrics           {workdir}/metrics.jsonl\n"
            f"learning curve    {workdir}/learning_curve.png"
        )
    print(
        f"TensorBoard       tensorboard --logdir {workdir}\n"
        f"evaluate again    python eval.py --workdir={workdir}"
    )
