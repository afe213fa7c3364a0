"""Judges the end of a run: what it lost, what differs, and what it printed."""

import contextlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from experiments.faults.runner import Exit
from skyformer_jax.training import checkpoints, logs

# Lines that a run prints when all is well, or when it puts aside a checkpoint that we damaged.
_ROUTINE = re.compile(
    r"training \w+ on |the training step compiled|step \d+/\d+  |going on from the checkpoint of "
    r"|preparing |.*, ETA |SIGTERM: stopping|stopped after step \d+; saved"
    r"|checkpoint .* is damaged: .*; moved it to |\[Gloo\] Rank "
    r"|W\d+ .*preemption_notifier.cc:\d+\] SIGTERM caught at "
)


class Seen(NamedTuple):
    """The finished checkpoints of a run."""

    steps: frozenset[int]
    best: tuple[float, int]  # accuracy and minus the step; -1 and 0 if none was validated
    aside: frozenset[str]  # names of those put aside as damaged or ahead

    @property
    def newest(self) -> int:
        """The last step, or 0 if there is none."""
        return max(self.steps, default=0)


def look(run: Path, damaged: Collection[int] = ()) -> Seen:
    """Returns the finished checkpoints of a run that has ended, without the damaged steps."""
    directory = run / "checkpoints"
    steps = frozenset(checkpoints.steps(directory)) - set(damaged)
    ranked = [(-1.0, 0)]
    for step in steps:
        with contextlib.suppress(checkpoints.DamagedCheckpointError):
            validation = checkpoints.read_meta(directory, step)["validation"]
            if validation:
                ranked.append((validation["accuracy"], -step))
    aside = (path for name in ("damaged", "ahead") for path in run.glob(f"{name}/*"))
    return Seen(steps, max(ranked), frozenset(f"{p.parent.name}/{p.name}" for p in aside))


def lost(before: Seen, after: Seen, log: str, ours: Collection[int] = ()) -> list[str]:
    """Returns a text for each problem with the finished checkpoints after another start.

    A start must neither lose nor ignore them. It may put aside those of the steps in `ours`, which
    we damaged.
    """
    found = []
    from_step = re.search(r"going on from the checkpoint of step (\d+)", log)
    if before.newest and "\ntraining " in f"\n{log}":
        found.append(f"began anew although step {before.newest} was finished")
    if from_step and int(from_step[1]) < before.newest:
        found.append(f"went on from step {from_step[1]} although {before.newest} was finished")
    if after.newest < before.newest:
        found.append(f"the newest checkpoint, {before.newest}, is gone")
    if after.best < before.best:
        found.append(f"the best checkpoint, {-before.best[1]}, is gone")
    for name in sorted(after.aside - before.aside):
        if int(re.split("[/-]", name)[1]) not in ours:
            found.append(f"{name} was put aside")
    return found


def ending(run: Path) -> dict[str, Any]:
    """Returns how a finished run ended: digest of the last checkpoint, curve, and test result."""
    test = json.loads((run / "eval_test.json").read_text())
    directory = run / "checkpoints"
    return {
        "digest": checkpoints.read_meta(directory, checkpoints.steps(directory)[-1])["digest"],
        "curve": [
            [entry[k] for k in ("step", "split", "loss", "accuracy")]
            for entry in logs.read_metrics(run / "metrics.jsonl")
        ],
        "test": {k: test[k] for k in ("checkpoint", "accuracy", "loss", "confusion")},
    }


def differences(expected: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """Returns a text for each field in which two endings differ."""
    return [f"another {field} at the end" for field in expected if expected[field] != end[field]]


def strays(log: str) -> list[str]:
    """Returns the lines that a run does not print when all is well."""
    return [line for line in log.splitlines() if line.strip() and not _ROUTINE.match(line)]


def said(log: str) -> list[str]:
    """Returns a problem if the log has a line that a run does not print when all is well."""
    return [f"said: {line}" for line in strays(log)[:1]]


def complaint(end: Exit) -> tuple[str, list[str]]:
    """Checks that a process failed with exactly one error line.

    Returns:
      That line, or the last one, and what is wrong with the failure.
    """
    lines = strays(end.log)
    line = lines[-1] if lines else ""
    if end.status != 2 or len(lines) != 1 or not line.startswith("error: "):
        how = "hung" if end.status is None else f"exit status {end.status}"
        return line, [f"{how} and {len(lines)} lines instead of one"]
    return line, []


def finished(expected: dict[str, Any], run: Path, end: Exit) -> list[str]:
    """Returns what is wrong with a run that had to end as expected."""
    if end.status != 0:
        how = "hung" if end.status is None else f"exit status {end.status}"
        return [f"did not end well: {how}: {(strays(end.log) or ['no word'])[-1]}"]
    try:
        found = ending(run)
    except (OSError, ValueError) as error:
        return [f"what it left cannot be read: {error}"]
    return said(end.log) + differences(expected, found)
