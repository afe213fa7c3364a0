"""Starts, watches, disturbs and waits for the runs of the soak.

The folder of a trial has `disk`, which may be a separate disk and has the workdir `run`; and beside
it `logs`, `data` and `cache`, the compiled programs.
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
    # Relative to a trial's folder: checkpoints contain the config, and must be equal in all trials.
    "data.dir": "data",
}
_SETTINGS_OF_TWO = {
    "train.num_steps": 60,  # two processes are slow on a small machine
    "parallel.num_processes": 2,
    # The same in all trials, as checkpoints contain it; below the ports that systems assign.
    "parallel.coordinator": "127.0.0.1:29431",
}
_TRAIN = (f"{ROOT}/train.py",)
_SECONDS_A_RUN = 150  # a run that takes longer counts as hung


class Exit(NamedTuple):
    """How a training process ended."""

    status: int | None  # None if it hung and was killed
    log: str  # its standard error
    phase: str  # phase of the run at the fault; "" if the run was over before
    seconds: float = 0.0  # from the fault, or from the start, to the end


class Fault(NamedTuple):
    """An action on a training process, and when to take it."""

    action: Callable[[subprocess.Popen], Any]
    seconds: float = 0.0  # to wait from the start of the process, or from the beginning of phase
    phase: str = ""  # to wait for first, if any


def workdir(folder: Path) -> Path:
    """Returns the workdir of a trial."""
    return folder / "disk" / "run"


def new_folder(folder: Path, shared: Path | None) -> Path:
    """Makes an empty trial folder, with links to the data and compiled programs in `shared`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("disk", "logs"):
        (folder / name).mkdir(parents=True)
    for name in ("data", "cache") if shared else ():
        (shared / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(shared / name)
    return folder


def phase(run: Path, data: Path, log: str, num_steps: int = NUM_STEPS) -> str:
    """Returns the phase that a run is or was in, by the files on disk and its log."""
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


def run(folder: Path, fault: Fault | None = None, **options: Any) -> Exit:
    """Trains in one process; see run_all."""
    return run_all(folder, fault, **options)[0]


def run_all(
    folder: Path,
    fault: Fault | None = None,
    *,
    num_processes: int = 1,
    victim: int = 0,
    program: Sequence[str] = _TRAIN,
    **settings: Any,
) -> list[Exit]:
    """Trains in a trial's folder until all processes have ended; kills those that hang.

    Args:
      folder: the trial's folder.
      fault: the fault to make during training, if any.
      num_processes: number of processes that share the run, 1 or 2.
      victim: index of the process that the fault strikes.
      program: arguments of Python in place of train.py.
      **settings: fields of the config, which override those of all runs.
    """
    settings = _SETTINGS | (_SETTINGS_OF_TWO if num_processes == 2 else {}) | settings
    number = len(list((folder / "logs").iterdir()))
    files = [folder / "logs" / f"{number + i}.txt" for i in range(num_processes)]

    def phase_now() -> str:
        steps = settings["train.num_steps"]
        return phase(workdir(folder), folder / "data", files[0].read_text(), steps)

    running, exits, struck = [], [], ""
    try:
        for i, file in enumerate(files):
            own = {"parallel.process_id": i} if num_processes > 1 else {}
            running.append(_start(folder, file, program, settings | own))
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
            process.kill()
            process.wait()
    return exits


def _start(
    folder: Path, log: Path, program: Sequence[str], settings: dict[str, Any]
) -> subprocess.Popen:
    command = [
        sys.executable,
        *program,
        f"--config={ROOT}/configs/quickstart.py",
        f"--workdir={workdir(folder)}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
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
    """Makes the fault at its moment; returns the phase, or "" if the process ended before."""
    if fault.phase and not wait(process, lambda: phase_now() == fault.phase):
        return ""
    moment = time.monotonic() + fault.seconds
    if not wait(process, lambda: time.monotonic() >= moment):
        return ""
    struck = phase_now()
    fault.action(process)
    return struck


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """Waits for a condition; returns False if the process ended or hung before it held."""
    deadline = time.monotonic() + _SECONDS_A_RUN
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.003)
    return False
