"""What an accelerator makes of the attentions and of training, by one command under a deadline.

    python -m experiments.benchmarks.accelerator --minutes=15 --source=DIR

The sections run in this order, each in a process of its own, so that a program that brings down
the device's runtime costs its section alone:

1. numbers: values and gradients of all attentions and forms against float64 and the CPU.
2. gaussian: how near Skyformer's two Gaussian passes, queries with landmarks and landmarks with
   keys, come to what the device can do: the share of the measured time that arithmetic at the peak
   rate, or reading every input and writing every output once, would take, whichever is more.
3. attention: time and temporaries of all attentions, and of cuDNN's, as speed.py has them, at a
   fixed number of tokens in a call, which fills the device at every length: what is linear in the
   length takes the same time at each, what is quadratic grows with it.
4. steps: steps per second of training in the paper's settings, with one and with three seeds, and
   what 50,000 would take beside the hours of the paper's table 2.
5. training: runs of train.py in the paper's settings, in the order of the flags --run.

Each section but the last has a share of the minutes. What time does not reach is recorded as not
reached. A program that does not compile or run is recorded with its error, and everything else
goes on. Training takes what is left; it stops with a checkpoint, and the same command with
--sections=training goes on. The JSON has commit, versions and hardware and is written as results
come; a plot of the third section lies beside it. --small is tiny in everything, to try the script
on a CPU.
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

# Seconds that a section may take longer than it should before it is killed.
_GRACE = 40
# The share of the minutes after which a section ends, if it has not ended by itself.
ENDS = {"numbers": 0.12, "gaussian": 0.17, "attention": 0.31, "steps": 0.45, "training": 1.0}

_MINUTES = flags.DEFINE_float("minutes", 15, "Time for everything.", lower_bound=0)
_SECTIONS = flags.DEFINE_list("sections", list(ENDS), "Sections to run, of those above.")
_SMALL = common_flags.small()
_OUT = common_flags.out("results/accelerator.json")
_COMMIT = flags.DEFINE_string("commit", "", "Commit that the result says where there is no git.")
_RUNS = flags.DEFINE_multi_string(
    "run",
    ["text:skyformer", "listops:skyformer", "pathfinder:skyformer", "image:skyformer"],
    "CONFIG:ATTENTION[,VARIANT] of a run to train; several are trained in this order.",
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Models that a run trains at once.")
_MORE_MINUTES = flags.DEFINE_float(
    "more_minutes", 0, "Time that later calls will have: runs that need it are begun as well."
)
_RUN_DIR = flags.DEFINE_string("run_dir", "runs/accelerator", "Folder of the runs.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared data sets lie or are put.")
_SOURCE = flags.DEFINE_string("source", "", "Folder with aclImdb and cifar-10-batches-bin.")
# For the processes of the sections.
_SECTION = flags.DEFINE_string("section", "", "Runs this section in this very process.")
_SECONDS = flags.DEFINE_float("seconds", 0, "Time of that section.")
_RATES = flags.DEFINE_string("rates", "{}", "Its steps per second by CONFIG:ATTENTION, as JSON.")
_IMPLEMENTATIONS = flags.DEFINE_string("implementations", "{}", "Its forms by attention, as JSON.")


def _run_here() -> None:
    """Runs one section and writes what it finds into --out as it comes."""
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
    """What a section found in a process of its own, whatever became of the process."""
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
    if name == "training":  # whose runs need the memory that this process would take first
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    process = subprocess.Popen([*command, f"--out={part}"], env=environment, start_new_session=True)
    try:
        # A section looks at the time itself, between its programs, and one of these may hang.
        status = process.wait(seconds + _GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
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
    """Starts to prepare the data of the runs, on the CPU, beside the other sections."""
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
