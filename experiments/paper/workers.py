"""Runs the processes that train the cells of a grid, each of them train.py."""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.paper.cell_results import read_cell, to_train
from experiments.paper.grid import ROOT, Cell
from experiments.records import read_json, write_json
from skyformer_jax.errors import UserError
from skyformer_jax.files import lock
from skyformer_jax.progress import say

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclasses.dataclass
class _Attempt:
    """A run that a worker trains; without a process, it waits for one that another started.

    `cells` are those of the run, one for each seed that its process trains.
    """

    cells: Sequence[Cell]
    process: subprocess.Popen | None
    started: float
    log_start: int = 0

    @property
    def run_dir(self) -> Path:
        """The workdir of the process."""
        return self.cells[0].run_dir


def _is_held(workdir: Path) -> bool:
    """Returns whether a process is training there, by the lock of train.py."""
    path = workdir / "lock"
    if not path.exists():
        return False
    try:
        with lock(path, wait=False):
            return False
    except BlockingIOError:
        return True


def _lowest_priority(process: subprocess.Popen) -> None:
    """Gives a process the lowest priority on the machine.

    If Linux groups processes by session (sched(7), "The autogroup feature"), it schedules the
    groups against each other, and a nice value counts only within the session.
    """
    with contextlib.suppress(OSError):  # the process has ended
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        Path(f"/proc/{process.pid}/autogroup").write_text("19")


def _start(cells: Sequence[Cell], environment: dict[str, str], idle: bool) -> _Attempt:
    run_dir, arguments = cells[0].run_dir, cells[0].run_arguments
    if _is_held(run_dir):
        say(f"{run_dir.name}: another process is training it; waiting for that to end")
        return _Attempt(cells, None, time.monotonic())
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"--workdir={run_dir}"]
    with (run_dir / "train.log").open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # A terminal's Ctrl-C goes to the sweep alone, which passes it on once.
            start_new_session=True,
        )
    if idle:
        _lowest_priority(process)
    return _Attempt(cells, process, time.monotonic(), log_start)


def _error(attempt: _Attempt) -> str:
    """Returns one line that says why the attempt did not finish its cells."""
    with (attempt.run_dir / "train.log").open("rb") as log:
        log.seek(attempt.log_start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if own:
        return own[-1]
    code = attempt.process.returncode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"{how} after: {lines[-1]}" if lines else how


def _record(attempt: _Attempt, provenance: dict[str, Any], stopping: bool) -> None:
    """Adds an attempt that has ended to the record of its run, sweep.json."""
    path = attempt.run_dir / "sweep.json"
    before = read_json(path) if path.exists() else {"seconds": 0, "attempts": 0}
    finished = all((cell.workdir / "eval_test.json").exists() for cell in attempt.cells)
    stopped = stopping and attempt.process.returncode <= 0
    record = {
        "seconds": round(before["seconds"] + time.monotonic() - attempt.started, 1),
        "attempts": before["attempts"] + 1,
        "error": None if finished or stopped else _error(attempt),
        "provenance": provenance,
    }
    write_json(path, record)


def _look(attempt: _Attempt, stopping: bool) -> str:
    """Returns the state of an attempt: "running", "over", or "again" to start it once more."""
    process = attempt.process
    if process is None:
        if not stopping and _is_held(attempt.run_dir):
            return "running"
        rows = {cell.workdir: read_cell(cell) for cell in attempt.cells}
        return "again" if to_train(attempt.cells, rows) and not stopping else "over"
    if process.poll() is None:
        return "running"
    # A process of an earlier sweep had not yet taken its lock when we looked.
    return "again" if process.returncode and not stopping and _is_held(attempt.run_dir) else "over"


def _send(attempt: _Attempt, number: int) -> None:
    """Sends a signal to an attempt's process, if it has one of its own."""
    if attempt.process is not None:
        attempt.process.send_signal(number)


def train_cells(
    cells: Sequence[Cell],
    environments: Sequence[dict[str, str]],
    provenance: dict[str, Any],
    signals: list[int],
    *,
    idle: bool = False,
    pause: Path | None = None,
) -> Iterator[list[Cell]]:
    """Trains unfinished cells, one run at a time in each environment.

    The first received signal is passed on as SIGTERM, so that the runs save and stop. Each further
    SIGINT is passed on in the same way and stops them at once.

    Args:
      cells: the cells, in the order in which to train them. Cells of one run_dir are trained by one
        process, when the first of them has its turn.
      environments: the environment variables of each worker.
      provenance: the provenance for the record of each attempt.
      signals: the signals received so far; it grows while the function runs.
      idle: whether to train at the lowest priority.
      pause: a file; while it exists, the running cells are paused.

    Yields:
      From time to time, the cells that have ended since the last time.
    """
    runs: dict[Path, list[Cell]] = {}
    for cell in cells:
        runs.setdefault(cell.run_dir, []).append(cell)
    pending, at_work, passed_on = collections.deque(runs.values()), {}, 0
    paused = False
    while at_work or (pending and not signals):
        for worker, environment in enumerate(environments):
            if pending and worker not in at_work and not signals and not paused:
                at_work[worker] = _start(pending.popleft(), environment, idle)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        asked = pause is not None and pause.exists() and not signals
        if asked != paused:
            paused = asked
            say(f"paused, until {pause} is removed" if paused else "going on")
            for attempt in at_work.values():
                _send(attempt, signal.SIGSTOP if paused else signal.SIGCONT)
        if signals and not passed_on:
            say(f"{signal.Signals(signals[0]).name}: the running cells save and stop")
        # A scheduler may send SIGTERM repeatedly; a second one would keep train.py from saving.
        to_pass_on = signals[:1] + [n for n in signals[1:] if n == signal.SIGINT]
        for _ in to_pass_on[passed_on:]:
            for attempt in at_work.values():
                _send(attempt, signal.SIGTERM)
        passed_on = len(to_pass_on)
        ended, stopping = [], bool(signals)
        for worker, attempt in list(at_work.items()):
            state = _look(attempt, stopping)
            if state == "again":
                at_work[worker] = _start(attempt.cells, environments[worker], idle)
            elif state == "over":
                if attempt.process is not None:
                    _record(attempt, provenance, stopping)
                ended += attempt.cells
                del at_work[worker]
        yield ended


def make_environments(workers: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """Returns the workers' environments; each worker sees one device, if devices are given."""
    workers = workers or len(devices) or 1
    if not devices:
        return [dict(os.environ)] * workers
    environments = [
        {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        for device in itertools.islice(itertools.cycle(devices), workers)
    ]
    if workers > len(devices):
        share = 0.9 / math.ceil(workers / len(devices))
        for environment in environments:
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
    return environments


def find_provenance(environment: dict[str, str]) -> dict[str, Any]:
    """Returns the provenance of a worker's runs.

    A short-lived process finds it, because this process must not allocate GPU memory.

    Raises:
      UserError: if JAX does not start in that process.
    """
    program = (
        "import json, jax; from experiments.records import provenance; "
        "print(json.dumps(provenance(jax.device_count())))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"JAX does not start: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list to which received SIGTERM and SIGINT are appended."""
    received: list[int] = []
    old = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
