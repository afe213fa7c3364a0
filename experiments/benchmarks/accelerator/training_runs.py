"""Runs train.py for one run after another until the time is over; a second call resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.accelerator.settings import Settings
from experiments.paper import published
from experiments.records import Row, read_json
from skyformer_jax.progress import say

_ROOT = Path(__file__).resolve().parents[3]
# Seconds of a run that are not steps: start, compiling, and the evaluation at the end.
_OVERHEAD = 45
# Time of a step within a run over that of a step alone: input, validations, checkpoints.
_SLOWER = 1.25
# A run without time for the paper's 50,000 steps has as many thousands as fit, at least these.
_FEWEST_STEPS = 5_000
_EVAL_EVERY = 1_000
_PLACES = ("data.dir", "data.source", "compilation_cache")  # fields that a result leaves out
_TO_SAVE = 15  # seconds from a signal until a run has saved its checkpoint


def _num_steps(run: str, settings: Settings) -> int:
    """Returns the steps that a new run can take in the time left, or 0 if they are too few."""
    if settings.small:
        return 20
    rate = settings.rates.get(run.partition(",")[0])
    if rate is None:
        return published.STEPS
    seconds = settings.deadline - time.monotonic() + settings.later_seconds - _OVERHEAD
    fit = int(seconds * rate / _SLOWER) // _EVAL_EVERY * _EVAL_EVERY
    return min(fit, published.STEPS) if fit >= _FEWEST_STEPS else 0


def source_of(task: str, source: str) -> str:
    """Returns the source of a task's published data, or "" if its data are generated."""
    return source if task in ("text", "image") else ""


def _overrides(run: str, num_steps: int, settings: Settings) -> dict[str, Any]:
    task = run.partition(":")[0]
    every = num_steps // 2 if settings.small else _EVAL_EVERY
    name = run.partition(":")[2].partition(",")[0] or "skyformer"
    return {
        "attention.implementation": settings.implementations.get(name),
        "num_seeds": settings.num_seeds,
        "train.num_steps": num_steps,
        "train.eval_every": every,
        "train.warmup_steps": 5 if settings.small else None,
        "data.dir": settings.data_dir,
        "data.source": source_of(task, settings.source),
        "compilation_cache": "",
    }


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _read(workdir: Path) -> Row:
    """Reads how far a run has come, from the files in its folder."""
    row: Row = {"validation": {}, "training_loss": {}, "step": 0}
    for path in sorted(workdir.glob("**/metrics.jsonl")):
        metrics = _lines(path)
        seed = path.parent.name if path.parent != workdir else "seed-0"
        row["validation"][seed] = [
            {key: line[key] for key in ("step", "loss", "accuracy")}
            for line in metrics
            if line["split"] == "validation"
        ]
        training = [line for line in metrics if line["split"] == "train"]
        row["training_loss"][seed] = [
            [line["step"], round(line["loss"], 5)] for line in training if line["step"] % 500 == 0
        ]
        if training:
            row["step"] = training[-1]["step"]
            rates = sorted(line["examples_per_second"] for line in training)
            row["median_examples_per_second"] = rates[len(rates) // 2]
    result = workdir / "eval_test.json"
    if result.exists():
        row["test"] = read_json(result)
    return row


def _wait(process: subprocess.Popen, deadline: float) -> None:
    """Waits for a run, and asks it to save and stop at the deadline."""
    try:
        process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def train_in_turn(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields {"rows": ...} after each run, with a row for each run that was started.

    A row has run, overrides, num_steps, full (whether num_steps is the paper's), step (the last one
    taken), seconds in this call, test (the content of eval_test.json) if it exists, the validations
    and the training loss of each seed, and error if the run failed.
    """
    rows: list[Row] = []
    for run in settings.runs:
        config, _, argument = run.partition(":")
        workdir = settings.run_dir / run.replace(":", "-").replace(",", "-")
        begun = workdir / "config.json"
        num_steps = (
            read_json(begun)["train"]["num_steps"] if begun.exists() else _num_steps(run, settings)
        )
        finished = (workdir / "eval_test.json").exists()
        if not finished and (time.monotonic() > settings.deadline - _OVERHEAD or not num_steps):
            if begun.exists() or rows:
                say(f"{run}: no time is left")
            continue
        overrides = _overrides(run, num_steps, settings)
        overrides = {field: value for field, value in overrides.items() if value is not None}
        said = {field: value for field, value in overrides.items() if field not in _PLACES}
        row = {"run": run, "overrides": said, "num_steps": num_steps}
        row |= {"full": num_steps == published.STEPS, "seconds": 0.0}
        if not finished:
            variant = ",small" if settings.small else ""
            command = [sys.executable, str(_ROOT / "train.py"), f"--workdir={workdir}"]
            command.append(f"--config={_ROOT / 'configs' / config}.py:{argument}{variant}")
            command += [f"--config.{field}={value}" for field, value in overrides.items()]
            start = time.monotonic()
            workdir.mkdir(parents=True, exist_ok=True)
            with (workdir / "train.log").open("ab") as log:
                environment = dict(os.environ)
                environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
                process = subprocess.Popen(command, stderr=log, env=environment)
                _wait(process, settings.deadline - _TO_SAVE)
            row["seconds"] = round(time.monotonic() - start, 1)
            if process.returncode:
                last = (workdir / "train.log").read_text(errors="replace").strip().splitlines()[-1:]
                row["error"] = f"train.py ended with status {process.returncode}: {''.join(last)}"
        rows.append(row | _read(workdir))
        say(_line(rows[-1]))
        yield {"rows": rows}


def _line(row: Row) -> str:
    parts = [f"{row['run']:24} step {row['step']:,} of {row['num_steps']:,}"]
    parts.append(f"{row['seconds']:.0f} s")
    best = [max((x["accuracy"] for x in rows), default=0) for rows in row["validation"].values()]
    parts.append("best validation " + " ".join(f"{100 * x:.2f}" for x in best))
    if "test" in row:
        parts.append(f"test {100 * row['test']['accuracy']:.2f} %")
    return "  ".join([*parts, row.get("error", "")]).rstrip()


def as_text(rows: Sequence[Row]) -> str:
    """Formats each run as a line."""
    return "\n".join(map(_line, rows))
