"""The trials of the faults: each disturbs a short run, starts it again, and judges its end."""

import functools
import itertools
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.faults import damage, judge, runner
from experiments.faults.damage import NotTriedError
from experiments.faults.runner import Fault, new_folder, run, run_all, workdir
from experiments.records import Row
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, logs
from skyformer_jax.training.config import read
from skyformer_jax.training.run import new_run
from skyformer_jax.training.state import state_spec

KILLS_A_TRIAL = 5
_SAME_END = "bit-identical end"
_LINE_THEN_SAME_END = "one clear line, then bit-identical end"
_TOO_LATE = "the run was over before its moment"
# Phases to aim at, and the latest moment of the fault in seconds after the phase has begun.
_PHASES = {
    "save": 0.03,
    "preparation": 5.0,
    "final evaluation": 2.0,
    "compiling": 0.2,
    "validation": 0.1,
    "steps": 2.0,
}


class Lab(NamedTuple):
    """What the trials share."""

    scratch: Path  # the folder of all trials, with the prepared data and compiled programs
    num_processes: int  # processes that share each run
    end: dict[str, Any]  # the end of the undisturbed run, from judge.ending
    seconds: float  # the time of the undisturbed run


def make_lab(scratch: Path, num_processes: int) -> Lab:
    """Prepares the data, and finishes two undisturbed runs, whose ends must be the same.

    Raises:
      UserError: if one of them fails, or their ends differ.
    """
    say(f"running undisturbed, twice, in {num_processes} process(es)")
    ends, seconds = [], 0.0
    for name in ("undisturbed", "again"):  # the first one prepares the data and compiles
        folder, begin = new_folder(scratch / name, scratch), time.monotonic()
        for end in run_all(folder, num_processes=num_processes):
            if end.status != 0:
                line = "".join(judge.strays(end.log)[-1:])
                raise UserError(f"an undisturbed run ended with status {end.status}: {line}")
        seconds = time.monotonic() - begin
        ends.append(judge.ending(workdir(folder)))
    if different := judge.differences(*ends):
        raise UserError(
            f"two undisturbed runs differ ({'; '.join(different)}): nothing can be compared on "
            "this machine"
        )
    return Lab(scratch, num_processes, ends[0], seconds)


def make_row(phase: str, detail: str, outcome: str, problems: list[str], line: str = "") -> Row:
    """Returns the record of a fault, with its outcome or, in its place, the problems."""
    outcome, ok = "; ".join(problems) or outcome, not problems
    return {"phase": phase, "detail": detail, "outcome": outcome, "ok": ok, "line": line}


def _finish(lab: Lab, folder: Path, before: judge.Seen) -> list[str]:
    """Finishes a run after a fault; returns what was lost since `before` or is wrong otherwise."""
    end, *others = run_all(folder, num_processes=lab.num_processes)
    problems = judge.lost(before, judge.look(workdir(folder)), end.log)
    problems += judge.finished(lab.end, workdir(folder), end)
    for other in others:
        problems += [f"the other {text}" for text in judge.said(other.log)]
        problems += [f"the other: exit status {other.status}"] if other.status != 0 else []
    return problems


def _refused(
    lab: Lab,
    folder: Path,
    end: runner.Exit,
    detail: str,
    mend: Callable[[], Any] = lambda: None,
    again: bool = False,
    others: Sequence[str] = (),
) -> list[Row]:
    """Judges a process that had to end with one line, mends the cause and finishes the run.

    If `again`, the run is first started once with the cause still there, which must also end with
    one line. `others` are problems that the caller found.
    """
    before = judge.look(workdir(folder))
    line, problems = judge.complaint(end)
    if again:
        detail += ", and started again before there were more"
        problems += judge.complaint(run(folder))[1]
    mend()
    problems += [*others, *_finish(lab, folder, before)]
    return [make_row(end.phase, detail, _LINE_THEN_SAME_END, problems, line)]


def _signals(
    action: Callable[[subprocess.Popen], None],
    num_aimed: int,
    num_random: int,
    lab: Lab,
    folder: Path,
    rng: random.Random,
    index: int,
) -> list[Row]:
    """Sends a signal to runs, num_aimed times in one phase, then num_random at random moments."""
    rows = []
    aims = [list(_PHASES)[index % len(_PHASES)]] * num_aimed + [""] * num_random
    for life in itertools.count():  # after a run that ended before its moment, another one starts
        # Prepared data would leave nothing to disturb in the preparation.
        shared = None if aims[0] == "preparation" else lab.scratch
        here, struck = new_folder(folder / f"run-{life}", shared), []
        while True:
            before = judge.look(workdir(here))
            aim = aims[0] if aims else ""
            seconds = rng.uniform(0, _PHASES.get(aim, lab.seconds))
            end = run(here, Fault(action, seconds, aim) if aims else None)
            after = judge.look(workdir(here))
            problems = judge.lost(before, after, end.log)
            if not end.phase:
                break
            outcome, wrong = _outcome(end, after)
            where = f"{seconds:.2f} s into {aim or 'the run'}"
            struck.append((end.phase, where, outcome, problems + judge.said(end.log) + wrong))
            aims = aims[1:]
        problems += judge.finished(lab.end, workdir(here), end)
        if problems and not struck:
            struck = [("no fault", "", "", [])]
        rows += [make_row(*one, own + problems) for *one, own in struck]
        if not aims or end.status != 0:
            return rows


def _outcome(end: runner.Exit, after: judge.Seen) -> tuple[str, list[str]]:
    """Returns how a process ended after a signal, and what is wrong with that."""
    saved = re.search(r"stopped after step (\d+); saved", end.log)
    if end.status == 0 and saved and int(saved[1]) == after.newest:
        return f"saved, then {_SAME_END}", []
    if end.status == -signal.SIGKILL or (end.status == 0 and not saved):
        return _SAME_END, []
    unsaved = ("start-up", "preparation", "final evaluation", "finished")
    if end.status == -signal.SIGTERM and end.phase in unsaved:
        return f"died with nothing to save, then {_SAME_END}", []
    return "", [f"exit status {end.status} in {end.phase} without a save"]


def _kill_halfway(folder: Path) -> None:
    """Starts a run and kills it once it has a checkpoint of at least half of its steps."""
    directory = workdir(folder) / "checkpoints"

    def kill(process: subprocess.Popen) -> None:
        half = runner.NUM_STEPS // 2
        runner.wait(process, lambda: max(checkpoints.steps(directory), default=0) >= half)
        process.kill()

    run(folder, Fault(kill))


def _damage(
    how: Callable[[Path, random.Random, int], str],
    lab: Lab,
    folder: Path,
    rng: random.Random,
    index: int,
) -> list[Row]:
    """Damages the newest checkpoint of a run that was killed halfway, and resumes the run."""
    _kill_halfway(folder)
    newest = judge.look(workdir(folder)).newest
    detail = how(workdir(folder) / "checkpoints" / str(newest), rng, index)
    before = judge.look(workdir(folder), damaged=[newest])
    end = run(folder)
    problems = judge.lost(before, judge.look(workdir(folder)), end.log, ours=[newest])
    problems += judge.finished(lab.end, workdir(folder), end)
    aside = [line for line in end.log.splitlines() if "is damaged" in line]
    outcome = f"put aside, then {_SAME_END}" if aside else f"still whole, {_SAME_END}"
    return [make_row("after a kill", detail, outcome, problems, *aside[:1])]


def _full_disk(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """Starts on a disk that is too small, or fills the disk (almost) while a run goes on."""
    disk = folder / "disk"
    target = ("", "steps", "save", "validation", "compiling", "final evaluation")[index % 6]
    spare = rng.choice((0, 0, 4096, 30_000, 100_000, 300_000))
    with damage.small_disk(disk, 24 if index else 8):
        if index == 0:
            end, detail = run(folder)._replace(phase="before the start"), "8 MiB"
        else:
            seconds = rng.uniform(0, 0.05 if target else lab.seconds)
            end = run(folder, Fault(lambda process: damage.fill(disk, spare), seconds, target))
            detail = f"{spare:,} bytes left"
        if not end.phase:
            raise NotTriedError(_TOO_LATE)
        if end.status == 0 and index:
            problems = judge.finished(lab.end, workdir(folder), end)
            return [make_row(end.phase, detail, f"enough, {_SAME_END}", problems)]
        mend = functools.partial(damage.remount, disk, "size=64m")
        return _refused(lab, folder, end, detail, mend, again=index % 2 == 1)


def _read_only(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """Starts on a read-only disk, or makes folders read-only while a run goes on."""
    if index >= 3:
        return _locked(lab, folder, rng, index)
    disk = folder / "disk"
    with damage.small_disk(disk, 64):
        if index:
            (_kill_halfway if index == 1 else run)(folder)
        damage.remount(disk, "ro")
        end = run(folder)._replace(phase=("before the start", "halfway", "finished")[index])
        mend = functools.partial(damage.remount, disk, "rw")
        return _refused(lab, folder, end, "read-only disk", mend)


def _locked(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """Makes the workdir, or only its checkpoints, immutable while a run goes on."""
    locked = workdir(folder) / ("" if index % 2 else "checkpoints")
    target = ("compiling", "steps", "save")[index % 3]

    def lock(process: subprocess.Popen) -> None:
        del process
        damage.administer("chattr", "+i", locked)

    try:
        end = run(folder, Fault(lock, rng.uniform(0, 0.5), target))
    finally:
        if locked.exists():
            damage.administer("chattr", "-i", locked)
    detail = f"no changes in {locked.relative_to(folder / 'disk')} from then on"
    return _refused(lab, folder, end, detail)


def _not_a_number(lab: Lab, folder: Path, rng: random.Random, index: int) -> list[Row]:
    """Gives a run a batch that makes the model return NaN; the run stops or skips the step."""
    non_finite = ("stop", "skip")[index % 2]
    bad = rng.randrange(1, runner.NUM_STEPS + 1)
    program = ("-m", "experiments.faults.poisoned", f"--poisoned_step={bad}")
    end = run(folder, program=program, **{"train.non_finite": non_finite})
    lines, seen = judge.strays(end.log), judge.look(workdir(folder))
    problems = []
    if len(lines) != 1 or f" at step {bad}," not in lines[0]:
        problems.append(f"{len(lines)} lines instead of one that names the step")
    detail = f"at step {bad}, train.non_finite={non_finite}"
    if non_finite == "stop":
        good = (bad - 1) // runner.EVAL_EVERY * runner.EVAL_EVERY
        if seen.newest != good:
            problems.append(f"the newest checkpoint is {seen.newest}, not {good}")
        return _refused(lab, folder, end._replace(phase="steps"), detail, others=problems)
    outcome = "one step skipped and said so, parameters finite"
    if end.status != 0:
        problems.append(f"exit status {end.status}")
    problems = problems or _skipped(lab, workdir(folder), bad)
    return [make_row("steps", detail, outcome, problems, *lines[:1])]


def _skipped(lab: Lab, directory: Path, bad: int) -> list[str]:
    """Returns what is wrong with a finished run that had to skip one step."""
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
    """Sends SIGKILL or SIGTERM to one of two processes, once training has begun."""
    target = ("compiling", "steps", "save", "validation")[index // 2 % 4]
    victim = (index // 2 + index // 4) % 2
    action = (subprocess.Popen.kill, subprocess.Popen.terminate)[index % 2]
    seconds = rng.uniform(0, _PHASES[target])
    exits = run_all(folder, Fault(action, seconds, target), num_processes=2, victim=victim)
    if not exits[0].phase:
        raise NotTriedError(_TOO_LATE)
    after = judge.look(workdir(folder))
    detail = f"{action.__name__} process {victim}, {seconds:.2f} s into {target}"
    if action is subprocess.Popen.kill:
        other = exits[1 - victim]
        lines = judge.strays(other.log)
        ours = [line for line in lines if line.startswith("error: another process of this run")]
        said = "one clear line" if ours else "only lines of JAX's"
        outcome = f"the other ended by itself, {said}, then {_SAME_END}"
        detail += f"; the other: exit status {other.status} after {other.seconds:.1f} s"
        line = (ours or lines or [""])[0]
        problems = ["the other hung"] if other.status is None else []
        problems += ["the other ended as if all were well"] if other.status == 0 else []
    else:
        outcome, problems = _outcome(exits[0], after)
        line = "".join(re.findall(r"stopped after step \d+; saved", exits[0].log))
        for end in exits:
            problems += judge.said(end.log)
            problems += [f"exit status {end.status}"] if end.status != 0 else []
    problems += _finish(lab, folder, after)
    return [make_row(exits[0].phase, detail, outcome, problems, line)]


# For each fault, a function and the number of trials. The function makes one trial in its own
# folder and returns rows of what it tried and how that ended.
FAULTS: dict[str, tuple[Callable[[Lab, Path, random.Random, int], list[Row]], int]] = {
    "kill": (functools.partial(_signals, subprocess.Popen.kill, 2, KILLS_A_TRIAL - 2), 20),
    "term": (functools.partial(_signals, subprocess.Popen.terminate, 1, 1), 5),
    "truncate": (functools.partial(_damage, damage.truncate), 3),
    "flip": (functools.partial(_damage, damage.flip), 8),
    "empty": (functools.partial(_damage, damage.empty), 2),
    "full-disk": (_full_disk, 7),
    "read-only": (_read_only, 6),
    "nan": (_not_a_number, 4),
    "one-of-two": (_one_of_two, 8),
}
