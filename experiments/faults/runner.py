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
    """The end of one process that trained."""

    status: int | None  # None if it hung and was killed
    log: str  # its standard error
    phase: str  # of the run when the fault was made; "" if the run was over before
    seconds: float = 0.0  # from the fault, or from the start, to the end


class Fault(NamedTuple):
    """What is done to a process that trains, and when."""

    action: Callable[[subprocess.Popen], Any]
    seconds: float = 0.0  # to wait from the start of the process, or from the beginning of phase
    phase: str = ""  # to wait for first, if any


def workdir(folder: Path) -> Path:
    """The workdir of a trial."""
    return folder / "disk" / "run"


def new_folder(folder: Path, shared: Path | None) -> Path:
    """Makes a trial's folder anew; shared, if any, holds prepared data and compiled programs."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("disk", "logs"):
        (folder / name).mkdir(parents=True)
    for name in ("data", "cache") if shared else ():
        (shared / name).mkdir(exist_ok=True)
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


def run(folder: Path, fault: Fault | None = None, **options: Any) -> Exit:
    """Trains in one process, see run_all."""
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
    """Trains in a trial's folder until the end of all processes, of which hanging ones are killed.

    Args:
      folder: the trial's folder.
      fault: to make while they train, if any.
      num_processes: that share the run, 1 or 2.
      victim: which of them the fault strikes.
      program: arguments of Python that stand for train.py.
      **settings: fields of the config, over those of all runs.
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
    """Makes the fault at its moment; returns its phase, "" if the process ended before."""
    if fault.phase and not wait(process, lambda: phase_now() == fault.phase):
        return ""
    moment = time.monotonic() + fault.seconds
    if not wait(process, lambda: time.monotonic() >= moment):
        return ""
    struck = phase_now()
    fault.action(process)
    return struck


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """Waits until the condition holds; False if the process ended or hung before."""
    deadline = time.monotonic() + _SECONDS_A_RUN
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.003)
    return False
