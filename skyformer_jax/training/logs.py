"""The logs of a run: progress on the terminal, metrics.jsonl, TensorBoard, the learning curve."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from skyformer_jax.progress import open_bar, say


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the entries of a metrics.jsonl up to the first line that is incomplete."""
    entries = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries


def training_seconds(entries: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Returns the seconds spent on steps, without compilation, validation and interruptions.

    Args:
      entries: all entries of a run, from read_metrics.
      batch_size: train.batch_size.
    """
    seconds, before = 0.0, 0
    for entry in entries:
        if entry["split"] == "train":
            seconds += (entry["step"] - before) * batch_size / entry["examples_per_second"]
            before = entry["step"]
    return seconds


class MetricsLog:
    """Appends metrics to metrics.jsonl and to TensorBoard events.

    It drops entries that an interrupted run logged after first_step, since those steps are taken
    again. It writes events without tensorboardX's thread, which dies when the disk is full, after
    which its writer waits forever.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        path = workdir / "metrics.jsonl"
        kept = [entry for entry in read_metrics(path) if entry["step"] <= first_step]
        partial = path.with_suffix(".jsonl.tmp")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        partial.replace(path)
        self._file = path.open("a")
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}"))
        self._write_event(0, file_version="brain.Event:2")
        # TensorBoard then hides the entries of earlier files from that step on.
        self._write_event(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, split: str, **metrics: float) -> None:
        """Writes one line, and one TensorBoard scalar "split/name" for each metric."""
        self._file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._write_event(step, summary=summary.scalar(f"{split}/{name}", value))
        self._events.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._events.write(event.SerializeToString())

    def close(self) -> None:
        """Closes both files."""
        with contextlib.closing(self._events):
            self._file.close()


class StepProgress:
    """The progress of training: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._last_step, self._last_time = first_step, time.perf_counter()
        # Of the recent steps alone, because first steps on drawn tokens take less time than others.
        self._recent_steps, self._recent_seconds = (tqdm.std.EMA(0.1) for _ in range(2))
        self._bar = open_bar(num_steps, initial=first_step, unit="step")

    def step(self, step: int) -> None:
        """Advances the bar to a finished step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, *, loss: float, accuracy: float, rate: float) -> None:
        """Shows the training metrics of the latest steps; rate is in examples per second."""
        text = f"loss {loss:.4f}  accuracy {accuracy:.4f}  {rate:,.0f} examples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now = time.perf_counter()
        steps = self._recent_steps(step - self._last_step)
        seconds = self._recent_seconds(now - self._last_time)
        self._last_step, self._last_time = step, now
        eta = tqdm.tqdm.format_interval(seconds / max(steps, 1e-9) * (self._num_steps - step))
        say(f"step {step}/{self._num_steps}  {text}  ETA {eta}")

    def close(self) -> None:
        """Closes the bar at its current position."""
        if self._bar is not None:
            self._bar.close()


def plot_learning_curve(workdir: Path, floors: dict[str, float]) -> Path | None:
    """Draws learning_curve.png from metrics.jsonl.

    Args:
      workdir: the folder of the run.
      floors: accuracies in 0..1 of trivial classifiers, by name, drawn as dashed lines.

    Returns:
      The path of the image. If matplotlib is missing or has no folder for its caches, prints a line
      and returns None.
    """
    try:
        from matplotlib.figure import Figure  # imported here, since it is slow to load
    except (ImportError, OSError) as error:
        say(f"the learning curve is not drawn: {error}")
        return None

    entries = read_metrics(workdir / "metrics.jsonl")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for split, style in (("train", {"lw": 1, "alpha": 0.6}), ("validation", {"marker": "."})):
            points = [(e["step"], e[name]) for e in entries if e["split"] == split]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=split, **style)
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
    for floor, accuracy in floors.items():
        axes[1].axhline(accuracy, ls="--", lw=1, color="gray")
        axes[1].text(
            *(0, accuracy, f" {floor}"),
            transform=axes[1].get_yaxis_transform(),  # x as a fraction of the width
            va="bottom",
            fontsize=8,
            color="gray",
        )
    axes[0].legend()
    path = workdir / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path
