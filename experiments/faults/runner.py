"""How the runs of the soak are started, watched, disturbed and waited for.

The folder of a trial holds `disk`, which may be a disk of its own and holds the workdir `run`,
and beside it `logs`, `data` and `cache`, the compiled programs.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from skyformer_jax.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, EVAL_EVERY, LOG_EVERY = 200, 20, 10
_SETTINGS = {
    "seed": 1,
    "model.width": 16,
    "model.num_layers": 1,
    "model.mlp_dim": 16,
    "attention.num_landmarks": 8,
    "train.num_steps": NUM_STEPS,
    "train.eval_every": EVAL_EVERY,
    "train.log_every": LOG_EVERY,
    "train.warmup_steps": 5,
    "train.batch_size": 16,
    "train.learning_rate": 0.03,  # with this seed the best is not the newest, from step 120 on
    # Relative to a trial's folder: checkpoints hold the config, and must be the same in all.
    "data.dir": "data",
}
_SETTINGS_OF_TWO = {
    "train.num_steps": 60,  # two processes are slow on a small machine
    "parallel.num_processes": 2,
    # The same in all trials, as checkpoints hold the config; below the ports that systems assign.
    "parallel.coordinator": "127.0.0.1:29431",
}
_TRAIN = (f"{ROOT}/train.py",)
_SECONDS_A_RUN = 150  # a run that takes longer hangs


class Exit(NamedTuple):
    """The end of one process that trained.

    Attributes:
      status: exit status, None if the process hung and was killed.
      log: its standard error.
      phase: of the run when the fault was made; "" if the run was over before.
      seconds: from the fault, or from the start, to the end.
    """

    status: int | None
    log: str
    phase: str
    seconds: float = 0.0


class Fault(NamedTuple):
    """What is done to a process that trains, and when.

    Attributes:
      action: called with the process.
      seconds: to wait from the start of the process, or from the beginning of `phase`.
      phase: to wait for first, if any.
    """

    action: Callable[[subprocess.Popen], Any]
    seconds: float = 0.0
    phase: str = ""


def workdir(folder: Path) -> Path:
    """The workdir of a trial."""
    return folder / "disk" / "run"


def new_folder(folder: Path, shared: Path | None) -> Path:
    """Makes a trial's folder anew.

    Args:
      folder: to make.
      shared: holds prepared data and compiled programs; None if the trial makes its own.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("disk", "logs"):
        (folder / name).mkdir(parents=True)
    for name in ("data", "cache") if shared else ():
        (folder / name).symlink_to(shared / name)
    return folder


def phase(run: Path, data: Path, log: str, num_steps: int = NUM_STEPS) -> str:
    """The phase that a run is, or was, in, by what is on disk and what it has said."""
    if not re.search(r"^(training|going on)", log, re.MULTILINE):
        begun = "preparing " in log and any(data.glob("*/*/incomplete.*"))
        return "preparation" if begun else "start-up"
    if (run / "eval_test.json").exists():
        return "finished"
    if num_steps in checkpoints.steps(run / "checkpoints"):
        return "final evaluation"
    if "step compiled in" not in log:
        return "compiling"
    if any((run / "checkpoints").glob("*checkpoint-tmp*")):
        return "save"
    last = re.match(r"step (\d+)/\d+  loss", log.splitlines()[-1])
    return "validation" if last and int(last[1]) % EVAL_EVERY == 0 else "steps"


def run(
    folder: Path, fault: Fault | None = None, program: Sequence[str] = _TRAIN, **settings: Any
) -> Exit:
    """Trains in a trial's folder, with a fault or none, until the end.

    Args:
      folder: of the trial.
      fault: to make while it trains.
      program: arguments of Python that stand for train.py.
      **settings: fields of the config, over those of all runs.
    """
    return _run_all(folder, [settings], fault, program=program)[0]


def run_two(folder: Path, fault: Fault | None = None, victim: int = 0) -> list[Exit]:
    """As run, by two processes that share one run; the fault strikes the victim of them."""
    both = [{**_SETTINGS_OF_TWO, "parallel.process_id": i} for i in range(2)]
    return _run_all(folder, both, fault, victim)


def _run_all(
    folder: Path,
    settings: list[dict[str, Any]],
    fault: Fault | None,
    victim: int = 0,
    program: Sequence[str] = _TRAIN,
) -> list[Exit]:
    """Starts a process for each of the settings, and waits for all."""
    number = len(list((folder / "logs").iterdir()))
    files = [folder / "logs" / f"{number + i}.txt" for i in range(len(settings))]
    num_steps = settings[0].get("train.num_steps", NUM_STEPS)

    def phase_now() -> str:
        return phase(workdir(folder), folder / "data", files[0].read_text(), num_steps)

    running, exits, struck = [], [], ""
    try:
        for file, one in zip(files, settings, strict=True):
            running.append(_start(folder, file, program, one))
        if fault is not None:
            struck = _strike(fault, running[victim], phase_now)
        begin = time.monotonic()
        for process, file in zip(running, files, strict=True):
            try:
                status = process.wait(max(0, begin + _SECONDS_A_RUN - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = None
            exits.append(Exit(status, file.read_text(), struck, time.monotonic() - begin))
    finally:
        for process in running:
            kill(process)
    return exits


def _start(
    folder: Path, log: Path, program: Sequence[str], settings: dict[str, Any]
) -> subprocess.Popen:
    command = [
        sys.executable,
        *program,
        f"--config={ROOT}/configs/quickstart.py",
        f"--workdir={workdir(folder)}",
        *(f"--config.{name}={value}" for name, value in (_SETTINGS | settings).items()),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, cwd=folder, env=environment
        )


def _strike(fault: Fault, process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
    """Makes the fault at its moment; returns its phase, "" if the process ended before."""
    if fault.phase and not wait(process, lambda: phase_now() == fault.phase):
        return ""
    moment = time.monotonic() + fault.seconds
    if not wait(process, lambda: time.monotonic() >= moment):
        return ""
    before = phase_now()
    fault.action(process)
    return before if process.poll() is None else phase_now()


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """Waits until the condition holds; False if the process ended or hung before."""
    deadline = time.monotonic() + _SECONDS_A_RUN
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.003)
    return False


def kill(process: subprocess.Popen) -> None:
    """Sends SIGKILL and waits for the end."""
    process.kill()
    process.wait()


def terminate(process: subprocess.Popen) -> None:
    """Sends SIGTERM."""
    process.terminate()
