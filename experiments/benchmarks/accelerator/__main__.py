"""Measures the attentions and training on an accelerator, by one command with a deadline.

    python -m experiments.benchmarks.accelerator --minutes=15 --source=DIR

The sections run in this order, each in its own process, so that a program that crashes the device's
runtime costs only its section:

1. numbers: compares values and gradients of all attentions and their implementations with float64
   or the CPU.
2. gaussian: how near Skyformer's two Gaussian passes, queries with landmarks and landmarks with
   keys, come to the limits of the device. The least time of a pass is the longer of arithmetic at
   the peak rate, and reading every input and writing every output once; the section reports it as
   a share of the measured time.
3. attention: time and temporaries of all attentions, as in speed.py, and of cuDNN's. The number of
   tokens per call is fixed and fills the device at every length, so that an attention that is
   linear in the length takes the same time at each, and a quadratic one grows with it.
4. steps: steps per second of training in the paper's settings, with one and with three seeds, and
   the hours of 50,000 steps beside those in the paper's table 2.
5. training: runs of train.py in the paper's settings, in the order of the --run flags.

Each section but the last has a share of the minutes. A program for which no time is left is
recorded as not reached. A program that does not compile or run is recorded with its error, and
everything else continues. Training takes the remaining time and stops with a checkpoint; the same
command with --sections=training resumes it. The JSON has commit, versions and hardware and is
written as results come in, with a plot of the third section beside it. --small makes everything
tiny, to try the script on a CPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.benchmarks import common_flags
from experiments.benchmarks.accelerator import numbers, sections
from experiments.benchmarks.accelerator.settings import Settings
from experiments.benchmarks.accelerator.training_runs import source_of
from experiments.records import provenance, read_json, write_json
from skyformer_jax import cli
from skyformer_jax.errors import one_of
from skyformer_jax.progress import say

# Seconds by which a section may exceed its time before it is killed.
_GRACE = 40
# When each section ends at the latest, as a share of the minutes.
ENDS = {"numbers": 0.12, "gaussian": 0.17, "attention": 0.31, "steps": 0.45, "training": 1.0}

_MINUTES = flags.DEFINE_float("minutes", 15, "Minutes for all sections.", lower_bound=0)
_SECTIONS = flags.DEFINE_list("sections", list(ENDS), "Sections to run.")
_SMALL = common_flags.small()
_OUT = common_flags.out("results/accelerator.json")
_COMMIT = flags.DEFINE_string("commit", "", "Commit to record, for a machine without git.")
_RUNS = flags.DEFINE_multi_string(
    "run",
    ["text:skyformer", "listops:skyformer", "pathfinder:skyformer", "image:skyformer"],
    "CONFIG:ATTENTION[,VARIANT] of a run to train; repeatable, trained in this order.",
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Models that a run trains at once.")
_MORE_MINUTES = flags.DEFINE_float(
    "more_minutes",
    0,
    "Minutes that later calls will have; runs that need them are started as well.",
)
_RUN_DIR = flags.DEFINE_string("run_dir", "runs/accelerator", "Folder of the runs.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
_SOURCE = flags.DEFINE_string("source", "", "Folder with aclImdb and cifar-10-batches-bin.")
# Internal flags, for the processes of the sections.
_SECTION = flags.DEFINE_string("section", "", "Internal: run this section in this process.")
_SECONDS = flags.DEFINE_float("seconds", 0, "Internal: seconds of that section.")
_RATES = flags.DEFINE_string(
    "rates", "{}", "Internal: steps per second by CONFIG:ATTENTION, as JSON."
)
_IMPLEMENTATIONS = flags.DEFINE_string(
    "implementations", "{}", "Internal: implementations by attention, as JSON."
)


def _run_here() -> None:
    """Runs one section in this process, and writes its results to --out as they come in."""
    settings = Settings(
        deadline=time.monotonic() + _SECONDS.value,
        small=_SMALL.value,
        runs=tuple(_RUNS.value),
        num_seeds=_NUM_SEEDS.value,
        rates=json.loads(_RATES.value),
        implementations=json.loads(_IMPLEMENTATIONS.value),
        later_seconds=60 * _MORE_MINUTES.value,
        run_dir=Path(_RUN_DIR.value),
        data_dir=_DATA_DIR.value,
        source=_SOURCE.value,
    )
    for found in sections.SECTIONS[_SECTION.value](settings):
        write_json(Path(_OUT.value), {"provenance": provenance(jax.device_count()), **found})


def _run_section(name: str, seconds: float, result: dict[str, Any]) -> dict[str, Any]:
    """Runs a section in its own process; returns its results, however the process ended."""
    part = Path(_OUT.value).with_suffix(f".{name}.json")
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator", *sys.argv[1:]]
    command += [
        f"--section={name}",
        f"--seconds={seconds}",
        f"--rates={json.dumps(_rates(result))}",
    ]
    implementations = numbers.implementations(result.get("numbers", {}).get("rows", ()))
    command.append(f"--implementations={json.dumps(implementations)}")
    start = time.monotonic()
    say(f"{name}: {seconds:.0f} s")
    environment = dict(os.environ)
    if name == "training":  # its runs need the memory that the section would preallocate
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    process = subprocess.Popen([*command, f"--out={part}"], env=environment, start_new_session=True)
    try:
        # A section checks the time between its programs, but a program may hang.
        status = process.wait(seconds + _GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
        status = process.wait()
    found = read_json(part) if part.exists() else {}
    part.unlink(missing_ok=True)
    found["section_seconds"] = round(time.monotonic() - start, 1)
    if status:
        found["error"] = f"the process of this section ended with status {status}"
        say(f"{name}: {found['error']}")
    return found


def _rates(result: dict[str, Any]) -> dict[str, float]:
    """Measured steps per second with --num_seeds models, by CONFIG:ATTENTION."""
    return {
        f"{row['task']}:{row['attention']}": row["steps_per_second"]
        for row in result.get("steps", {}).get("rows", ())
        if row["num_seeds"] == _NUM_SEEDS.value and "steps_per_second" in row
    }


def _prepare_data() -> list[subprocess.Popen]:
    """Starts preparing the data of the runs on the CPU, while the other sections run."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = []
    for task in dict.fromkeys(run.partition(":")[0] for run in _RUNS.value):
        source = source_of(task, _SOURCE.value)
        command = [sys.executable, "-m", "skyformer_jax.prepare", f"--data_dir={_DATA_DIR.value}"]
        command += [f"--task={task}", *([f"--source={source}"] if source else [])]
        processes.append(subprocess.Popen(command, env=environment))
    return processes


def main() -> None:
    """Runs the sections, writing the result after each; prints tables and plots at the end."""
    if _SECTION.value:
        _run_here()
        return
    start = time.monotonic()
    for name in _SECTIONS.value:
        one_of("section", name, tuple(ENDS))
    path = Path(_OUT.value)
    result: dict[str, Any] = read_json(path) if path.exists() else {}
    result["what"] = (
        "numbers of all attentions; Gaussian passes against the device's peaks; attention "
        "functions at a fixed number of tokens in a call; training steps of the paper's settings "
        "on random tokens; runs of train.py"
    )
    result |= {"minutes": _MINUTES.value, "small": _SMALL.value, "seed": 0}
    train = "training" in _SECTIONS.value and not _SMALL.value
    preparing = _prepare_data() if train else []
    for name in _SECTIONS.value:
        if name == "training":
            for process in preparing:
                process.wait()
        left = start + ENDS[name] * 60 * _MINUTES.value - time.monotonic()
        found = _run_section(name, max(left, 0), result)
        header = found.pop("provenance", {})
        if _COMMIT.value:
            header["commit"] = _COMMIT.value
        result |= header
        result[name] = found
        write_json(path, result)
    print(sections.as_text(result))
    sections.plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
