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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import skyformer_jax.config
from skyformer_jax.data.batches import Examples, evaluation_batches, training_batches
from skyformer_jax.errors import UserError
from skyformer_jax.models import build_model
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, evaluation, logs, steps

# Steps that may be dispatched and not finished: enough to keep a device busy, few enough that
# stopping is prompt and their batches fit.
_IN_FLIGHT = 8


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any] | None:
    """Trains to the end, goes on where an earlier run in the workdir stopped, then evaluates.

    Args:
      config: as the files in configs/ build it.
      workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/, learning_curve.png and
        eval_test.json.

    Returns:
      What evaluate returns for the best checkpoint on the test split; None if a signal stopped
      the run before its end.

    Raises:
      UserError: for a config, data or a workdir that cannot work, or if the loss is not finite.
    """
    workdir = Path(workdir)
    skyformer_jax.config.check(config, jax.device_count())
    model, optimizer, mesh = build_model(config), steps.make_optimizer(config), steps.make_mesh()
    abstract_state = steps.abstract_state(config, model, optimizer, mesh)
    with _open_workdir(workdir, config, abstract_state):
        splits = tuple(evaluation.load_split(config, split) for split in ("train", "validation"))
        with _stop_signals() as stop:
            step = _run(config, workdir, model, optimizer, mesh, abstract_state, splits, stop)
        if step < config.train.num_steps:
            say(f"stopped after step {step}; saved. Start the same command to go on.")
            return None
        result = evaluation.evaluate(workdir)
        logs.plot_learning_curve(workdir, result["floors"])
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
    directory = workdir / "checkpoints"
    restored = checkpoints.restore_latest(directory, abstract_state)
    if restored is None:
        init = jax.jit(
            steps.init_state,
            static_argnums=(1, 2, 3),
            out_shardings=NamedSharding(mesh, P()),
        )
        state = init(config.seed, model, optimizer, steps.token_shape(config))
        step = 0
        say(
            f"training {config.attention.name} on {config.task}: {len(train_split.label):,} "
            f"examples, {settings.num_steps:,} steps of {settings.batch_size}, "
            f"{sum(p.size for p in jax.tree.leaves(state.params)):,} parameters, "
            f"{mesh.size} {jax.devices()[0].platform} device(s)"
        )
    else:
        state, meta = restored
        step = meta["step"]
        say(f"going on from the checkpoint of step {step}")
    if step == settings.num_steps:
        return step

    reading = evaluation.reading(config)
    train_step = steps.make_train_step(model, optimizer, mesh, settings.log_every, reading)
    predict_step = steps.make_predict_step(model, mesh, reading)
    schedule = steps.learning_rate_schedule(config)
    log = logs.MetricsLog(workdir, step)
    progress = logs.Progress(step, settings.num_steps)
    outstanding = collections.deque()  # (step, its sums, still on their way)
    clock = _Clock(step)

    def finish_one() -> None:
        done, sums = outstanding.popleft()
        jax.block_until_ready(sums)
        progress.step(done)
        if done % settings.log_every and done != settings.num_steps:
            return
        loss = float(sums["loss"] / sums["examples"])
        accuracy = float(sums["correct"] / sums["examples"])
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss is {loss} at step {done}; the last good checkpoint is kept in "
                f"{directory}; lower train.learning_rate"
            )
        input_share, steps_per_second = clock.lap(done)
        rate = steps_per_second * settings.batch_size
        progress.metrics(done, loss=loss, accuracy=accuracy, rate=rate)
        log.write(
            done,
            "train",
            loss=loss,
            accuracy=accuracy,
            learning_rate=float(schedule(done - 1)),
            examples_per_second=rate,
            input_share=input_share,
        )

    def save(validation: dict[str, float] | None) -> None:
        meta = {
            "step": step,
            "examples_read": step * settings.batch_size,
            "validation": validation,
            "config": skyformer_jax.config.to_dict(config),
        }
        checkpoints.save(manager, state, meta)

    buckets = config.data.get("buckets", ())
    batches = training_batches(
        train_split,
        settings.batch_size,
        config.model.max_length,
        seed=config.seed,
        first_step=step,
        buckets=buckets,
        process=(jax.process_index(), jax.process_count()),
    )
    with (
        _disk_errors(directory),
        contextlib.closing(progress),
        contextlib.closing(log),
        checkpoints.open_manager(directory) as manager,
    ):
        while step < settings.num_steps:
            with clock.input():
                batch = steps.shard_batch(next(batches), mesh)
            state, sums = train_step(state, batch)
            step += 1
            outstanding.append((step, sums))
            validate = step % settings.eval_every == 0 or step == settings.num_steps
            while outstanding and (validate or stop or len(outstanding) > _IN_FLIGHT):
                finish_one()
            if validate:
                with clock.paused():
                    validation_batches = evaluation_batches(
                        validation_split,
                        settings.batch_size,
                        config.model.max_length,
                        buckets=buckets,
                    )
                    logits = evaluation.predict(
                        predict_step, state.variables, validation_batches, mesh
                    )
                    scores = evaluation.score(logits, validation_split.label)
                    log.write(step, "validation", **scores)
                    say(
                        f"step {step}/{settings.num_steps}  validation loss {scores['loss']:.4f}  "
                        f"accuracy {scores['accuracy']:.4f}"
                    )
                    save(scores)
            if stop:
                if not validate:
                    save(None)
                break
    return step


class _Clock:
    """Steps per second since the last question, leaving out what is paused."""

    def __init__(self, step: int) -> None:
        self._step, self._start, self._input = step, time.perf_counter(), 0.0

    def lap(self, step: int) -> tuple[float, float]:
        """Share of the time since the last lap that went into input, and steps per second."""
        now = time.perf_counter()
        elapsed = now - self._start
        share, rate = self._input / elapsed, (step - self._step) / elapsed
        self._step, self._start, self._input = step, now, 0.0
        return share, rate

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Counts its block as input; the devices may be busy with earlier steps meanwhile."""
        begin = time.perf_counter()
        yield
        self._input += time.perf_counter() - begin

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


@contextlib.contextmanager
def _open_workdir(
    workdir: Path, config: ml_collections.ConfigDict, abstract_state: steps.TrainState
) -> Iterator[None]:
    """Makes or checks the workdir and holds it against a second training process."""
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
        begun = bool(checkpoints.steps(workdir / "checkpoints"))
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
        # Three checkpoints kept, and one being written.
        needed = 4 * sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state)
        )
        needed += 16 << 20
        free = shutil.disk_usage(workdir).free
        if free < needed:
            raise UserError(
                f"the disk of {workdir} has {free / 2**20:,.0f} MiB free; a run of this config "
                f"needs {needed / 2**20:,.0f} MiB: free some space or name another --workdir"
            )
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(asked, indent=1) + "\n")
        partial.replace(path)
        yield


def _print_summary(workdir: Path, result: dict[str, Any]) -> None:
    print(evaluation.table(result))
    validation = result["validation"]
    print(
        f"\nbest checkpoint   {workdir}/checkpoints/{result['checkpoint']} "
        f"(validation accuracy {100 * validation['accuracy']:.2f} %)\n"
        f"metrics           {workdir}/metrics.jsonl\n"
        f"TensorBoard       tensorboard --logdir {workdir}/tensorboard\n"
        f"learning curve    {workdir}/learning_curve.png\n"
        f"evaluate again    python eval.py --workdir={workdir}"
    )
