"""Tracks the dispatched training steps: waits for them, checks that they are finite, logs them."""

import collections
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from skyformer_jax.data.batches import Batch
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say
from skyformer_jax.training import processes
from skyformer_jax.training.logs import MetricsLog, StepProgress
from skyformer_jax.training.run import Run
from skyformer_jax.training.state import take
from skyformer_jax.training.workdir import SeedRun

# Steps that may be dispatched but unfinished: enough to keep a device busy, few enough that a run
# stops promptly and the batches fit in memory.
_IN_FLIGHT = 8


class Recorder:
    """Tracks the steps in flight and logs them; made by open_recorder."""

    def __init__(
        self,
        run: Run,
        seeds: Sequence[SeedRun],
        first_step: int,
        logs: Sequence[MetricsLog],
        progress: StepProgress,
    ) -> None:
        self._run, self._seeds = run, seeds
        self._logs, self._progress = logs, progress
        self._clock = _Clock(first_step)
        self._in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._compiled: set[tuple[int, ...]] = set()  # shapes of batches

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Counts the time of its block as waiting for input."""
        return self._clock.input()

    def dispatching(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """Counts the time of its block as compilation if the shape of the batch is new."""
        shape = batch.tokens.shape
        if shape in self._compiled:
            return contextlib.nullcontext()
        self._compiled.add(shape)
        return self._clock.compiling()

    def pausing(self) -> contextlib.AbstractContextManager[None]:
        """Excludes the time of its block from the time of steps."""
        return self._clock.paused()

    def add(self, step: int, sums: dict[str, jax.Array]) -> None:
        """Adds a dispatched step; waits for the oldest if too many are in flight."""
        self._in_flight.append((step, sums))
        if len(self._in_flight) > _IN_FLIGHT:
            self._finish_oldest()

    def flush(self) -> None:
        """Waits for all steps in flight, and checks the last one even if it is not logged.

        Raises:
          UserError: see check_finite.
        """
        while self._in_flight:
            self._finish_oldest(is_last=len(self._in_flight) == 1)

    def validation(self, step: int, scores: Sequence[dict[str, float]]) -> None:
        """Logs the validation scores of each seed."""
        for log, score in zip(self._logs, scores, strict=False):  # other processes have no logs
            log.write(step, "validation", **score)
        mean = {k: sum(score[k] for score in scores) / len(scores) for k in scores[0]}
        say(
            f"step {step}/{self._run.config.train.num_steps}  validation loss {mean['loss']:.4f}  "
            f"accuracy {mean['accuracy']:.4f}"
        )

    def _finish_oldest(self, *, is_last: bool = False) -> None:
        step, device_sums = self._in_flight.popleft()
        jax.block_until_ready(device_sums)
        self._progress.step(step)
        train = self._run.config.train
        is_logged = step % train.log_every == 0 or step == train.num_steps
        if not is_logged and not is_last:
            return
        sums = jax.device_get(device_sums)
        check_finite(train.non_finite, sums, step, self._seeds, report=is_logged)
        if is_logged:
            self._log(step, sums)

    def _log(self, step: int, sums: dict[str, np.ndarray]) -> None:
        train = self._run.config.train
        lap = self._clock.lap(step)
        rate = lap.pop("steps_per_second") * train.batch_size
        losses, accuracies = sums["loss"] / sums["examples"], sums["correct"] / sums["examples"]
        self._progress.metrics(
            step,
            loss=float(losses.mean()),
            accuracy=float(accuracies.mean()),
            rate=rate * len(self._seeds),
        )
        for i, log in enumerate(self._logs):
            log.write(
                step,
                "train",
                loss=float(losses[i]),
                accuracy=float(accuracies[i]),
                learning_rate=float(self._run.schedule(step - 1)),
                examples_per_second=rate,
                **_statistics(take(sums, i), train.batch_size),
                **lap,
            )


@contextlib.contextmanager
def open_recorder(run: Run, seeds: Sequence[SeedRun], first_step: int) -> Iterator[Recorder]:
    """Yields a Recorder of a run that has taken first_step steps.

    Args:
      run: the run.
      seeds: the models of the run. On the first process, each is logged into its own folder.
      first_step: number of steps taken so far.
    """
    with contextlib.ExitStack() as stack:
        progress = StepProgress(first_step, run.config.train.num_steps)
        stack.enter_context(contextlib.closing(progress))
        logs = []
        for one in seeds if processes.is_first() else ():
            log = MetricsLog(one.workdir, first_step)
            logs.append(stack.enter_context(contextlib.closing(log)))
        yield Recorder(run, seeds, first_step, logs, progress)


def check_finite(
    non_finite: str,
    sums: dict[str, np.ndarray],
    step: int,
    seeds: Sequence[SeedRun],
    *,
    report: bool,
) -> None:
    """Raises for steps whose loss or gradients were not finite, or reports them as skipped.

    Args:
      non_finite: train.non_finite, "stop" or "skip".
      sums: the sums of all seeds' states since the last multiple of train.log_every.
      step: the last step of the sums.
      seeds: the models of the run.
      report: whether to print the number of skipped steps.

    Raises:
      UserError: if a step was not finite, unless non_finite is "skip" and another step of the sums
        was finite.
    """
    for skipped, first, examples, one in zip(
        sums["skipped"], sums["first_skipped"], sums["examples"], seeds, strict=True
    ):
        if not skipped:
            continue
        what = f"loss or gradients are not finite at step {first}, seed {one.config.seed}"
        if non_finite == "stop" or not examples:
            raise UserError(
                f"{what}; the last good checkpoint is kept in {one.checkpoints}; lower "
                "train.learning_rate"
                + (
                    ", or skip such steps by train.non_finite=skip"
                    if examples
                    else f" (none of the {skipped} steps up to {step} was finite)"
                )
            )
        if report:
            say(f"{what}; {skipped} step(s) up to {step} skipped")


def _statistics(sums: dict[str, np.ndarray], batch_size: int) -> dict[str, Any]:
    """Returns the metrics that are logged besides loss and accuracy.

    skipped is the number of steps that were not finite. With train.statistics, gradient_norm is the
    mean norm of the gradient before clipping, block_<i>_rms the root mean square of the output of a
    block at real tokens, and, for Skyformer, block_<i>_nystrom_residual the mean of
    attention.nystrom_residual.
    """
    found: dict[str, Any] = {"skipped": int(sums["skipped"])} if sums["skipped"] else {}
    if "gradient_norm" in sums:
        # From the examples, since train.log_every may have been different before a restart.
        finite = float(sums["examples"]) / batch_size
        found["gradient_norm"] = float(sums["gradient_norm"]) / finite
        for i, mean_square in enumerate(sums["mean_square"]):
            found[f"block_{i}_rms"] = float(mean_square / finite) ** 0.5
        for i, residual in enumerate(sums.get("residual", ())):
            if np.isfinite(residual):
                found[f"block_{i}_nystrom_residual"] = float(residual / finite)
    return found


class _Clock:
    """Measures steps per second in each lap, without pauses and compilation."""

    def __init__(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()
        self._input = self._compile = 0.0

    def lap(self, step: int) -> dict[str, float]:
        """Ends a lap and returns its steps_per_second and input_share.

        input_share is the share of time spent on input. If a program was compiled in the lap, the
        result also has compile_seconds.
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
        """Counts its block as input; the devices may be running earlier steps meanwhile."""
        begin = time.perf_counter()
        yield
        self._input += time.perf_counter() - begin

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Excludes its block, the first call of a program, and prints how long it took."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._compile += seconds
        self._start += seconds
        say(f"the training step compiled in {seconds:.1f} s")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes its block from the lap."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin
