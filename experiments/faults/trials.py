"""One trial of each fault: a short run is disturbed, started again, and its end judged."""

import concurrent.futures
import functools
import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.faults import damage, judge, runner
from experiments.faults.damage import NotTriedError
from experiments.faults.runner import Fault, new_folder, run, run_two, workdir
from experiments.records import Row
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, logs
from skyformer_jax.training.config import read
from skyformer_jax.training.run import new_run
from skyformer_jax.training.state import state_spec

KILLS_A_TRIAL = 5
_HALFWAY = 100
_SAME_END = "bit-identical end"
_LINE_THEN_SAME_END = "one clear line, then bit-identical end"
_TOO_LATE = "the run was over before its moment"
# Phases that random moments seldom hit, and how many seconds they may last.
_TARGETS = {"save": 0.03, "validation": 0.1, "preparation": 5.0, "final evaluation": 2.0}


class Lab(NamedTuple):
    """What the trials share.

    Attributes:
      scratch: the folder of all, with the prepared data and compiled programs.
      end: of the undisturbed run, see judge.ending.
      seconds: that the undisturbed run took.
      run: starts a run undisturbed, waits for its end, and returns the Exit of each process.
    """

    scratch: Path
    end: dict[str, Any]
    seconds: float
    run: Callable[[Path], list[runner.Exit]]


def make_lab(scratch: Path) -> Lab:
    """Prepares the data, finishes undisturbed runs, and has one killed halfway."""
    for name in ("data", "cache"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    folders = [new_folder(scratch / name, scratch) for name in ("undisturbed", "again")]
    say("running undisturbed, thrice")
    run(folders[0])  # alone: it makes the data and the compiled programs
    new_folder(folders[0], scratch)
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(folders)) as pool:
        exits = list(pool.map(run, folders))
    seconds = time.monotonic() - start
    for end in exits:
        if end.status != 0:
            raise UserError(f"an undisturbed run failed: {' '.join(judge.strays(end.log)[-1:])}")
    ends = [judge.ending(workdir(folder)) for folder in folders]
    if judge.differences(*ends):
        raise UserError(
            f"two undisturbed runs differ ({'; '.join(judge.differences(*ends))}): nothing can be "
            "compared on this machine"
        )
    halfway = new_folder(scratch / "halfway", scratch)
    directory = workdir(halfway) / "checkpoints"

    def kill_halfway(process: Any) -> None:
        runner.wait(process, lambda: max(checkpoints.steps(directory), default=0) >= _HALFWAY)
        runner.kill(process)

    run(halfway, Fault(kill_halfway))
    return Lab(scratch, ends[0], seconds, lambda folder: [run(folder)])


def make_lab_of_two(scratch: Path) -> Lab:
    """Has two processes finish an undisturbed run."""
    for name in ("data", "cache"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    folder = new_folder(scratch / "two", scratch)
    say("running two processes undisturbed")
    start = time.monotonic()
    exits = run_two(folder)
    if any(end.status != 0 for end in exits):
        lines = [line for end in exits for line in judge.strays(end.log)]
        statuses = " and ".join(str(end.status) for end in exits)
        raise UserError(f"two undisturbed processes ended with {statuses}: {' '.join(lines[-1:])}")
    return Lab(scratch, judge.ending(workdir(folder)), time.monotonic() - start, run_two)


def _finish(
    lab: Lab, folder: Path, before: judge.Seen | None = None, ours: Collection[int] = ()
) -> list[str]:
    """Starts undisturbed after a fault; returns what is wrong with where that ends.

    Args:
      lab: of the trial.
      folder: of the trial.
      before: the checkpoints before this start, by default those of now.
      ours: steps that we damaged.
    """
    before = before or judge.look(workdir(folder))
    end, *others = lab.run(folder)
    problems = judge.lost(before, judge.look(workdir(folder)), end.log, ours)
    problems += judge.finished(lab.end, workdir(folder), end)
    for other in others:
        problems += [f"the other {text}" for text in judge.said(other.log)]
        problems += [f"the other: exit status {other.status}"] if other.status != 0 else []
    return problems


def make_row(phase: str, detail: str, outcome: str, problems: list[str], line: str = "") -> Row:
    """What is recorded of a fault: its outcome, or the problems in its place."""
    outcome, ok = "; ".join(problems) or outcome, not problems
    return {"phase": phase, "detail": detail, "outcome": outcome, "ok": ok, "line": line}


def _kills(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """SIGKILL KILLS_A_TRIAL times: at three random moments and twice in one of the targets."""
    target = list(_TARGETS)[index % len(_TARGETS)]
    aims = ["", target, "", target, ""]
    if target == "preparation":  # comes first in a run
        aims.sort(reverse=True)
    elif target == "final evaluation":
        aims.sort()
    rows = []
    for life in itertools.count():  # a run that ends before its kill is followed by another
        # Prepared data would leave nothing to kill in the preparation.
        shared = None if aims[0] == "preparation" else lab.scratch
        here = new_folder(folder / f"run-{life}", shared)
        kills = []
        while True:
            before = judge.look(workdir(here))
            aim = aims[0] if aims else ""
            seconds = rng.uniform(0, _TARGETS.get(aim, lab.seconds))
            end = run(here, Fault(runner.kill, seconds, aim) if aims else None)
            problems = judge.lost(before, judge.look(workdir(here)), end.log)
            if end.status != -signal.SIGKILL:
                break
            where = f"{seconds:.2f} s into {aim or 'the run'}"
            kills.append((end.phase, where, problems + judge.said(end.log)))
            aims.pop(0)
        problems += judge.finished(lab.end, workdir(here), end)
        if problems and not kills:
            kills = [("no fault", "", [])]
        rows += [make_row(phase, where, _SAME_END, own + problems) for phase, where, own in kills]
        if not aims or end.status != 0:
            return rows


def _terminations(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """SIGTERM twice in a run, at random moments, the first ones in phases that are short."""
    target = ("compiling", "preparation", "final evaluation", "save", *[""] * 99)[index]
    here = new_folder(folder / "run", None if target == "preparation" else lab.scratch)
    struck = []
    for aim in (target, ""):
        before = judge.look(workdir(here))
        seconds = rng.uniform(0, _TARGETS.get(aim, 0.2 if aim else lab.seconds))
        end = run(here, Fault(runner.terminate, seconds, aim))
        after = judge.look(workdir(here))
        if not end.phase:
            break  # over before its moment
        problems = judge.lost(before, after, end.log) + judge.said(end.log)
        saved = re.search(r"stopped after step (\d+); saved", end.log)
        outcome = ""
        if end.status == 0 and saved and int(saved[1]) in after.steps:
            outcome = f"saved, then {_SAME_END}"
        elif end.status == 0 and not saved:
            outcome = _SAME_END
        elif end.status == -signal.SIGTERM and end.phase in (
            *("start-up", "preparation", "final evaluation", "finished"),
        ):
            outcome = f"died with nothing to save, then {_SAME_END}"
        else:
            problems.append(f"exit status {end.status} in {end.phase} without a save")
        where = f"{seconds:.2f} s into {aim or 'the run'}"
        struck.append((end.phase, where, outcome, problems))
    problems = _finish(lab, here)
    return [make_row(*one, own + problems) for *one, own in struck]


def _damage(
    how: Callable[[Path, random.Random, int], str],
    lab: Lab,
    folder: Path,
    rng: random.Random,
    index: int,
) -> list[Row]:
    """Damages the newest checkpoint of a run that was killed halfway, and goes on."""
    here = new_folder(folder / "run", lab.scratch)
    shutil.copytree(lab.scratch / "halfway" / "disk", here / "disk", dirs_exist_ok=True)
    newest = judge.look(workdir(here)).newest
    detail = how(workdir(here) / "checkpoints" / str(newest), rng, index)
    before = judge.look(workdir(here), damaged=[newest])
    end = run(here)
    problems = judge.lost(before, judge.look(workdir(here)), end.log, ours=[newest])
    problems += judge.finished(lab.end, workdir(here), end)
    aside = [line for line in end.log.splitlines() if "is damaged" in line]
    outcome = f"put aside, then {_SAME_END}" if aside else f"still whole, {_SAME_END}"
    return [make_row("after a kill", detail, outcome, problems, *aside[:1])]


def _full_disk(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """A disk too small to start on, or one that is filled, nearly, while a run goes on."""
    here = new_folder(folder / "run", lab.scratch)
    disk = here / "disk"
    with damage.small_disk(disk, 24 if index else 8):
        if index == 0:
            line, problems = judge.complaint(run(here))
            damage.administer("mount", "-o", "remount,size=64m", disk)
            problems += _finish(lab, here)
            return [make_row("before the start", "8 MiB", _LINE_THEN_SAME_END, problems, line)]
        target = ("", "steps", "save", "validation", "compiling", "final evaluation")[index % 6]
        spare = rng.choice((0, 0, 4096, 30_000, 100_000, 300_000))
        seconds = rng.uniform(0, 0.05 if target else lab.seconds)
        end = run(here, Fault(lambda process: damage.fill(disk, spare), seconds, target))
        after = judge.look(workdir(here))
        detail = f"{spare:,} bytes left"
        if not end.phase:
            raise NotTriedError(_TOO_LATE)
        if end.status == 0:
            problems = judge.finished(lab.end, workdir(here), end)
            return [make_row(end.phase, detail, f"enough, {_SAME_END}", problems)]
        line, problems = judge.complaint(end)
        if index % 2:  # impatience
            detail += ", and started again before there were more"
            problems += judge.complaint(run(here))[1]
        (disk / "filler").unlink(missing_ok=True)
        problems += _finish(lab, here, after)
        return [make_row(end.phase, detail, _LINE_THEN_SAME_END, problems, line)]


def _read_only(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """A disk that is read-only at the start, or folders that become so while a run goes on."""
    if index >= 3:
        return _locked(lab, folder, rng, index)
    here = new_folder(folder / "run", lab.scratch)
    disk = here / "disk"
    with damage.small_disk(disk, 64):
        if index:
            source = lab.scratch / ("halfway" if index == 1 else "undisturbed") / "disk"
            shutil.copytree(source, disk, dirs_exist_ok=True)
        before = judge.look(workdir(here))
        damage.administer("mount", "-o", "remount,ro", disk)
        line, problems = judge.complaint(run(here))
        damage.administer("mount", "-o", "remount,rw", disk)
        problems += _finish(lab, here, before)
    phase = ("before the start", "halfway", "finished")[index]
    return [make_row(phase, "read-only disk", _LINE_THEN_SAME_END, problems, line)]


def _locked(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """Takes the right to change the workdir, or its checkpoints only, from a run that goes on."""
    here = new_folder(folder / "run", lab.scratch)
    locked = workdir(here) / ("" if index % 2 else "checkpoints")
    target = ("compiling", "steps", "save")[index % 3]

    def lock(process: Any) -> None:
        del process
        damage.administer("chattr", "+i", locked)

    try:
        end = run(here, Fault(lock, rng.uniform(0, 0.5), target))
    finally:
        if locked.exists():
            damage.administer("chattr", "-i", locked)
    after = judge.look(workdir(here))
    line, problems = judge.complaint(end)
    problems += _finish(lab, here, after)
    detail = f"no changes in {locked.relative_to(here / 'disk')} from then on"
    return [make_row(end.phase, detail, _LINE_THEN_SAME_END, problems, line)]


def _not_a_number(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """A batch of which the model makes NaN, in runs that stop there, or skip such steps."""
    non_finite = ("stop", "skip")[index % 2]
    bad = rng.randrange(1, runner.NUM_STEPS + 1)
    here = new_folder(folder / "run", lab.scratch)
    program = ("-m", "experiments.faults.poisoned", f"--poisoned_step={bad}")
    end = run(here, program=program, **{"train.non_finite": non_finite})
    detail = f"at step {bad}, train.non_finite={non_finite}"
    if non_finite == "stop":
        outcome, after = _LINE_THEN_SAME_END, judge.look(workdir(here))
        line, problems = judge.complaint(end)
        if f" at step {bad}," not in line:
            problems.append("the line does not name the step")
        good = (bad - 1) // runner.EVAL_EVERY * runner.EVAL_EVERY
        if after.newest != good:
            problems.append(f"the newest checkpoint is {after.newest}, not {good}")
        problems += _finish(lab, here, after)
    else:
        outcome, lines = "one step skipped and said so, parameters finite", judge.strays(end.log)
        line = lines[0] if lines else ""
        problems = [f"exit status {end.status}"] if end.status != 0 else []
        if len(lines) != 1 or f" at step {bad}," not in line:
            problems.append(f"{len(lines)} lines instead of one that names the step")
        problems = problems or _skipped(lab, workdir(here), bad)
    return [make_row("steps", detail, outcome, problems, line)]


def _skipped(lab: Lab, directory: Path, bad: int) -> list[str]:
    """What is wrong with a finished run that had to skip one step."""
    problems = []
    entries = logs.read_metrics(directory / "metrics.jsonl")
    window = -(-bad // runner.LOG_EVERY) * runner.LOG_EVERY
    skipped = [[entry["step"], entry["skipped"]] for entry in entries if "skipped" in entry]
    if skipped != [[window, 1]]:
        problems.append(f"metrics.jsonl has as skipped {skipped}")
    before = [row for row in lab.end["curve"] if row[0] < window]
    if judge.ending(directory)["curve"][: len(before)] != before:
        problems.append("another curve before that step")
    spec = state_spec(new_run(read(directory / "config.json")))
    state, _ = checkpoints.restore(directory / "checkpoints", runner.NUM_STEPS, spec)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
        problems.append("parameters that are not finite")
    return problems


def _one_of_two(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """SIGKILL or SIGTERM to one of two processes, once training has begun."""
    target = ("compiling", "steps", "save", "validation")[index // 2 % 4]
    victim, action = (index // 2 + index // 4) % 2, (runner.kill, runner.terminate)[index % 2]
    seconds = rng.uniform(0, {"steps": 2.0, **_TARGETS}.get(target, 0.2))
    here = new_folder(folder / "run", lab.scratch)
    exits = run_two(here, Fault(action, seconds, target), victim)
    after = judge.look(workdir(here))
    detail = f"{action.__name__} process {victim}, {seconds:.2f} s into {target}"
    if not exits[0].phase:
        raise NotTriedError(_TOO_LATE)
    if action is runner.kill:
        other = exits[1 - victim]
        lines = judge.strays(other.log)
        ours = [line for line in lines if line.startswith("error: another process of this run")]
        how = "only lines of JAX's"
        if ours:
            how = "one clear line" + (" beside JAX's own" if len(lines) > 1 else "")
        outcome = f"the other ended by itself, {how}, then {_SAME_END}"
        detail += f"; the other: exit status {other.status} after {other.seconds:.1f} s"
        line = (ours or lines or [""])[0]
        problems = ["the other hung"] if other.status is None else []
        problems += ["the other ended as if all were well"] if other.status == 0 else []
    else:
        saved = re.search(r"stopped after step (\d+); saved", exits[0].log)
        line = saved[0] if saved else ""
        outcome = f"both stopped at one step, then {_SAME_END}" if saved else _SAME_END
        problems = [f"exit status {end.status}" for end in exits if end.status != 0]
        problems += [text for end in exits for text in judge.said(end.log)]
        if saved and int(saved[1]) != after.newest:
            problems.append(f"the newest checkpoint is {after.newest}")
    problems += _finish(lab, here, after)
    return [make_row(exits[0].phase, detail, outcome, problems, line)]


# Each makes one trial in a folder of its own and returns rows of what it tried and what came of it;
# and the number of trials.
FAULTS: dict[str, tuple[Callable[[Lab, Path, random.Random, int], list[Row]], int]] = {
    "kill": (_kills, 20),
    "term": (_terminations, 5),
    "truncate": (functools.partial(_damage, damage.truncate), 3),
    "flip": (functools.partial(_damage, damage.flip), 8),
    "empty": (functools.partial(_damage, damage.empty), 2),
    "full-disk": (_full_disk, 7),
    "read-only": (_read_only, 6),
    "nan": (_not_a_number, 4),
    "one-of-two": (_one_of_two, 8),
}
