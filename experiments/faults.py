"""Kills, stops and starves many short runs, and checks that each still ends with the same bits.

    python experiments/faults.py
    python experiments/faults.py --faults=kill,flip --kills=20

After every fault the next start must go on to the bit-identical end of an undisturbed run, or stop
with one clear line; no finished checkpoint may be lost. So must two processes with one run between
them, of which one is killed or stopped; they are compared with two that nothing happened to. The
folder --dir keeps what was tried, so that the same command goes on where it was interrupted, and
the logs of what failed. Full and read-only disks need the right to mount; what could not be tried
is said to be so. Writes JSON with commit, versions and hardware; the exit status is 1 if any trial
failed.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import flags

from experiments.provenance import provenance, write_json
from skyformer_jax import cli, models
from skyformer_jax.config import one_of, read
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say, track
from skyformer_jax.training import checkpoints, logs, steps

_KILLS = flags.DEFINE_integer("kills", 100, "Moments of SIGKILL.", lower_bound=1)
_FAULTS = flags.DEFINE_list("faults", ["all"], "Which to try.")
_SMALL = flags.DEFINE_bool("small", False, "One trial of each fault.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and places.")
_DIR = flags.DEFINE_string("dir", "runs/faults", "Scratch folder.")
_OUT = flags.DEFINE_string("out", "results/faults.json", "File to write.")

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS, EVAL_EVERY = 200, 20
_HALFWAY = 100
_RUN = {
    "seed": 1,
    "model.width": 16,
    "model.num_layers": 1,
    "model.mlp_dim": 16,
    "attention.num_landmarks": 8,
    "train.num_steps": NUM_STEPS,
    "train.eval_every": EVAL_EVERY,
    "train.log_every": 10,
    "train.warmup_steps": 5,
    "train.batch_size": 16,
    "train.learning_rate": 0.03,  # with this seed the best is not the newest, from step 120 on
    # Relative to a trial's folder: checkpoints hold the config, and are to be the same in all.
    "data.dir": "data",
}
_NUM_STEPS_OF_TWO = 60  # two processes are slow on a small machine
_KILLS_A_TRIAL = 5
_SECONDS_A_RUN = 150  # beyond, it hangs
_WORKERS = 2  # processes that train at a time

# What a run says when all is well, or when a checkpoint that we damaged is put aside.
_ROUTINE = re.compile(
    r"training \w+ on |the training step compiled|step \d+/\d+  |going on from the checkpoint of "
    r"|preparing |.*, ETA |SIGTERM: stopping|stopped after step \d+; saved"
    r"|checkpoint .* is damaged: .*; moved it to |\[Gloo\] Rank "
    r"|W\d+ .*preemption_notifier.cc:\d+\] SIGTERM caught at "
)

Row = dict[str, Any]


class NotTriedError(Exception):
    """This machine does not let us make the fault."""


class Lab(NamedTuple):
    """What the trials share.

    Attributes:
      scratch: the folder of all, with the prepared data and compiled programs.
      end: what the undisturbed run came to, see ending.
      seconds: that it took.
      processes: that a run has.
    """

    scratch: Path
    end: dict[str, Any]
    seconds: float
    processes: int = 1


class Ran(NamedTuple):
    """A start of train.py that is over.

    Attributes:
      status: of its exit, None if it hung and was killed.
      log: its standard error.
      phase: that the fault fell in; "" if it was over before.
      seconds: from the fault, or the start, to the end.
    """

    status: int | None
    log: str
    phase: str
    seconds: float = 0.0


class Seen(NamedTuple):
    """The finished checkpoints of a run.

    Attributes:
      steps: their numbers.
      best: accuracy and minus the step of the best; -1 and 0 if none was validated.
      aside: what has been put aside as damaged or ahead.
    """

    steps: frozenset[int]
    best: tuple[float, int]
    aside: frozenset[str]

    @property
    def newest(self) -> int:
        """The last step, 0 if there is none."""
        return max(self.steps, default=0)


def look(run: Path, damaged: Collection[int] = ()) -> Seen:
    """The finished checkpoints of a run that is not running, but for the steps known as damaged."""
    directory = run / "checkpoints"
    steps = frozenset(checkpoints.steps(directory)) - set(damaged)
    ranked = [(-1.0, 0)]
    for step in steps:
        with contextlib.suppress(checkpoints.DamagedCheckpointError):
            validation = checkpoints.read_meta(directory, step)["validation"]
            if validation:
                ranked.append((validation["accuracy"], -step))
    aside = frozenset(f"{p.parent.name}/{p.name}" for p in run.glob("damaged/*"))
    aside |= frozenset(f"{p.parent.name}/{p.name}" for p in run.glob("ahead/*"))
    return Seen(steps, max(ranked), aside)


def lost(before: Seen, after: Seen, log: str, ours: Collection[int] = ()) -> list[str]:
    """What a start lost of the checkpoints that were finished before it.

    Args:
      before: it.
      after: it.
      log: what it said.
      ours: steps that we damaged, which it may put aside.

    Returns:
      A text for each loss.
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
        if int(name.partition("/")[2].partition("-")[0]) not in ours:
            found.append(f"{name} was put aside")
    return found


def ending(run: Path) -> dict[str, Any]:
    """What a finished run came to: digest of the last checkpoint, curve, and test result."""
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
    """The parts of two endings that are not the same."""
    return [f"another {part} at the end" for part in expected if expected[part] != end[part]]


def strays(log: str) -> list[str]:
    """The lines that a run does not say when all is well."""
    return [line for line in log.splitlines() if line.strip() and not _ROUTINE.match(line)]


def phase(run: Path, data: Path, log: str, num_steps: int = NUM_STEPS) -> str:
    """What a run is, or was, about, by what is on disk and what it has said."""
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


def truncate(checkpoint: Path, rng: random.Random, index: int) -> str:
    """Cuts all files of the state in half, or one file of the checkpoint anywhere; says which."""
    if index == 0:
        cut = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
        sizes = [path.stat().st_size // 2 for path in cut]
        what = "all of state/"
    else:
        cut = [rng.choice(_files(checkpoint))]
        sizes = [rng.randrange(cut[0].stat().st_size)]
        what = f"{_kind(checkpoint, cut[0])} to {sizes[0]} bytes"
    for path, size in zip(cut, sizes, strict=True):
        os.truncate(path, size)
    return what


def empty(checkpoint: Path, rng: random.Random, index: int) -> str:
    """Deletes everything in a checkpoint, or everything in all of its files; says which."""
    del rng
    if index == 0:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        return "the folder"
    for path in _files(checkpoint):
        os.truncate(path, 0)
    return "all files"


def flip(checkpoint: Path, rng: random.Random, index: int) -> str:
    """Flips one to eight bits of a file, each index of a file of another kind; says which."""
    kinds = collections.defaultdict(list)
    for path in _files(checkpoint):
        kinds[_kind(checkpoint, path)].append(path)
    kind = sorted(kinds)[index % len(kinds)]
    path = rng.choice(kinds[kind])
    content = bytearray(path.read_bytes())
    places = rng.sample(range(len(content)), min(len(content), rng.choice((1, 1, 2, 8))))
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{len(places)} bit(s) of {kind}"


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)


def _kind(checkpoint: Path, path: Path) -> str:
    """The file's name in the checkpoint, or its folder's where names are random."""
    return str((path.parent if path.parent.name == "d" else path).relative_to(checkpoint))


# A trial's folder: "disk" holds the workdir "run", and may be a disk of its own.
def _workdir(place: Path) -> Path:
    return place / "disk" / "run"


def _new_place(lab: Lab, place: Path, *, fresh_data: bool = False) -> Path:
    """Makes a trial's folder; fresh data are prepared, and programs compiled, by the trial."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("disk", "logs"):
        (place / name).mkdir(parents=True)
    if not fresh_data:
        for name in ("data", "cache"):
            (place / name).symlink_to(lab.scratch / name)
    return place


# Called with a running process and what tells its phase; makes the fault, and says its phase.
Fault = Callable[[subprocess.Popen, Callable[[], str]], str]


def _start(
    place: Path, log: Path, words: Collection[str], settings: dict[str, Any]
) -> subprocess.Popen:
    """A process that trains in a trial's folder, by words that are train.py or stand for it."""
    command = [
        sys.executable,
        *words,
        f"--config={ROOT}/configs/quickstart.py",
        f"--workdir={_workdir(place)}",
        *(f"--config.{name}={value}" for name, value in (_RUN | settings).items()),
    ]
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, cwd=place, env=environment
        )


def _run_all(
    place: Path,
    settings: list[dict[str, Any]],
    fault: Fault | None = None,
    victim: int = 0,
    words: Collection[str] = (f"{ROOT}/train.py",),
) -> list[Ran]:
    """Starts a process for each of the settings, one of them with a fault, and waits for all."""
    number = len(list((place / "logs").iterdir()))
    files = [place / "logs" / f"{number + i}.txt" for i in range(len(settings))]
    num_steps = settings[0].get("train.num_steps", NUM_STEPS)

    def phase_now() -> str:
        return phase(_workdir(place), place / "data", files[0].read_text(), num_steps)

    running, over, fell_in = [], [], ""
    try:
        for file, one in zip(files, settings, strict=True):
            running.append(_start(place, file, words, one))
        if fault is not None:
            fell_in = fault(running[victim], phase_now)
        begin = time.monotonic()
        for process, file in zip(running, files, strict=True):
            try:
                status = process.wait(max(0, begin + _SECONDS_A_RUN - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = None
            over.append(Ran(status, file.read_text(), fell_in, time.monotonic() - begin))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return over


def _run(
    place: Path,
    fault: Fault | None = None,
    words: Collection[str] = (f"{ROOT}/train.py",),
    **settings: Any,
) -> Ran:
    """Starts train.py, with a fault or none, and waits for its end."""
    return _run_all(place, [settings], fault, words=words)[0]


def _run_two(place: Path, fault: Fault | None = None, victim: int = 0) -> list[Ran]:
    """Starts two processes with one run between them, and waits for the end of both."""
    common = {
        "train.num_steps": _NUM_STEPS_OF_TWO,
        "parallel.num_processes": 2,
        # One for all, as checkpoints hold the config; below those that systems give to others.
        "parallel.coordinator": "127.0.0.1:29431",
    }
    both = [{**common, "parallel.process_id": i} for i in range(2)]
    return _run_all(place, both, fault, victim)


def _wait(process: subprocess.Popen, when: Callable[[], bool]) -> bool:
    """Waits for it to be true; False if the process ended or hung before."""
    deadline = time.monotonic() + _SECONDS_A_RUN
    while process.poll() is None and time.monotonic() < deadline:
        if when():
            return True
        time.sleep(0.003)
    return False


def _later(seconds: float, fault: Fault, target: str = "") -> Fault:
    """The fault so long after the start, or after the beginning of the target phase."""

    def delayed(process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
        if target and not _wait(process, lambda: phase_now() == target):
            return ""
        moment = time.monotonic() + seconds
        if not _wait(process, lambda: time.monotonic() >= moment):
            return ""
        return fault(process, phase_now)

    return delayed


def _kill(process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
    process.kill()
    process.wait()
    return phase_now()


def _terminate(process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
    now = phase_now()
    process.send_signal(signal.SIGTERM)
    return now


def complaint(ran: Ran) -> tuple[str, list[str]]:
    """Judges a start that had to fail.

    Args:
      ran: it.

    Returns:
      The last line that is no routine, and what is wrong: that it is not the only one, is not an
      error's, or that the exit status is not that of a UserError.
    """
    said = strays(ran.log)
    line = said[-1] if said else ""
    if ran.status is None:
        return line, ["hung"]
    if ran.status != 2 or len(said) != 1 or not line.startswith("error: "):
        return line, [f"exit status {ran.status} and {len(said)} lines instead of one"]
    return line, []


def _finished(lab: Lab, place: Path, ran: Ran) -> list[str]:
    """What is wrong with a run that had to come to its end."""
    said = strays(ran.log)
    if ran.status != 0:
        how = "hung" if ran.status is None else f"exit status {ran.status}"
        return [f"did not end well: {how}: {said[-1] if said else 'no word'}"]
    try:
        end = ending(_workdir(place))
    except (OSError, ValueError) as error:
        return [f"what it left cannot be read: {error}"]
    return [f"said: {line}" for line in said[:1]] + differences(lab.end, end)


def _finish(lab: Lab, place: Path, before: Seen, ours: Collection[int] = ()) -> list[str]:
    """Starts undisturbed after a fault; what is wrong with where it comes to."""
    ran, *others = _run_two(place) if lab.processes == 2 else [_run(place)]
    problems = lost(before, look(_workdir(place)), ran.log, ours) + _finished(lab, place, ran)
    for other in others:
        problems += [f"the other said: {line}" for line in strays(other.log)[:1]]
        problems += [f"the other: exit status {other.status}"] if other.status != 0 else []
    return problems


def _row(fell_in: str, detail: str, outcome: str, problems: list[str], line: str = "") -> Row:
    return {
        "phase": fell_in,
        "detail": detail,
        "outcome": "; ".join(problems) or outcome,
        "ok": not problems,
        "line": line,
    }


_SAME_END = "bit-identical end"
_LINE_THEN_SAME_END = "one clear line, then bit-identical end"
# Phases that random moments seldom hit, and how long they may last.
_TARGETS = {"save": 0.03, "validation": 0.1, "preparation": 5.0, "final evaluation": 2.0}


def kills(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """SIGKILL _KILLS_A_TRIAL times: at three random moments and twice in one of the targets."""
    target = list(_TARGETS)[index % len(_TARGETS)]
    aims = ["", target, "", target, ""]
    if target == "preparation":  # comes first in a run
        aims.sort(reverse=True)
    elif target == "final evaluation":
        aims.sort()
    rows, waiting = [], []
    for life in itertools.count():  # a run that ends before its kill is followed by another
        fresh = aims[0] == "preparation"  # else it would never come
        here = _new_place(lab, place / f"run-{life}", fresh_data=fresh)
        status = None
        while status != 0:
            before = look(_workdir(here))
            aim = aims[0] if aims else ""
            seconds = rng.uniform(0, _TARGETS.get(aim, lab.seconds))
            ran = _run(here, _later(seconds, _kill, aim) if aims else None)
            status = ran.status
            problems = lost(before, look(_workdir(here)), ran.log)
            if status != -signal.SIGKILL:
                problems += _finished(lab, here, ran)
                if problems and not waiting:
                    waiting.append(("no fault", "", []))
                rows += [_row(*row[:2], _SAME_END, row[2] + problems) for row in waiting]
                waiting = []
                break
            problems += [f"said: {line}" for line in strays(ran.log)[:1]]
            where = f"{seconds:.2f} s into {aim or 'the run'}"
            waiting.append((ran.phase, where, problems))
            aims.pop(0)
        if not aims or status != 0:
            break
    return rows


def terminations(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """SIGTERM twice in a run, at random moments, the first ones in phases that are short."""
    target = ("compiling", "preparation", "final evaluation", "save", *[""] * 99)[index]
    here = _new_place(lab, place / "run", fresh_data=target == "preparation")
    rows = []
    for aim in (target, ""):
        before = look(_workdir(here))
        seconds = rng.uniform(0, _TARGETS.get(aim, 0.2 if aim else lab.seconds))
        ran = _run(here, _later(seconds, _terminate, aim))
        after = look(_workdir(here))
        if not ran.phase:
            break  # over before its moment
        problems = lost(before, after, ran.log) + [f"said: {x}" for x in strays(ran.log)[:1]]
        saved = re.search(r"stopped after step (\d+); saved", ran.log)
        where = f"{seconds:.2f} s into {aim or 'the run'}"
        if ran.status == 0 and saved and int(saved[1]) in after.steps:
            outcome = f"saved, then {_SAME_END}"
        elif ran.status == 0 and not saved:
            outcome = _SAME_END
        elif ran.status == -signal.SIGTERM and ran.phase in (
            "start-up",
            "preparation",
            "final evaluation",
            "finished",
        ):
            outcome = f"died with nothing to save, then {_SAME_END}"
        else:
            outcome = ""
            problems.append(f"exit status {ran.status} in {ran.phase} without a save")
        rows.append((ran.phase, where, outcome, problems))
    end = _finish(lab, here, look(_workdir(here)))
    return [_row(*row[:3], row[3] + end) for row in rows]


def _halfway(lab: Lab, place: Path) -> Path:
    """A trial's folder with a run that was killed halfway, after a save."""
    here = _new_place(lab, place / "run")
    shutil.copytree(lab.scratch / "halfway" / "disk", here / "disk", dirs_exist_ok=True)
    return here


def damage(
    how: Callable[[Path, random.Random, int], str],
    lab: Lab,
    place: Path,
    rng: random.Random,
    index: int,
) -> list[Row]:
    """Damages the newest checkpoint of a run that was killed halfway, and goes on."""
    here = _halfway(lab, place)
    newest = look(_workdir(here)).newest
    detail = how(_workdir(here) / "checkpoints" / str(newest), rng, index)
    before = look(_workdir(here), damaged=[newest])
    ran = _run(here)
    problems = lost(before, look(_workdir(here)), ran.log, ours=[newest])
    problems += _finished(lab, here, ran)
    aside = [line for line in ran.log.splitlines() if "is damaged" in line]
    outcome = f"put aside, then {_SAME_END}" if aside else f"still whole, {_SAME_END}"
    return [_row("after a kill", detail, outcome, problems, aside[0] if aside else "")]


def _command(*words: str | Path) -> None:
    """Runs a command of the system's administration."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotTriedError(f"no {words[0]} here") from None
    if done.returncode:
        raise NotTriedError(f"{words[0]}: {' '.join(done.stderr.split())}")


@contextlib.contextmanager
def _small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    _command("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder)
    try:
        yield
    finally:
        _command("umount", folder)


def fill(folder: Path, spare: int) -> Path:
    """Fills the disk of a folder up to so many bytes, by a file which it returns."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    # The last write came short of a page at most.
    os.truncate(filler, max(filler.stat().st_size - spare, 0))
    return filler


def full_disk(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """A disk too small to start on, or one that is filled but for little while a run goes on."""
    here = _new_place(lab, place / "run")
    with _small_disk(here / "disk", 24 if index else 8):
        if index == 0:
            ran = _run(here)
            line, problems = complaint(ran)
            _command("mount", "-o", "remount,size=64m", here / "disk")
            end = _finish(lab, here, look(_workdir(here)))
            return [_row("before the start", "8 MiB", _LINE_THEN_SAME_END, problems + end, line)]
        target = ("", "steps", "save", "validation", "compiling", "final evaluation")[index % 6]
        spare = rng.choice((0, 0, 4096, 30_000, 100_000, 300_000))
        seconds = rng.uniform(0, 0.05 if target else lab.seconds)

        def fault(process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
            del process
            now = phase_now()
            fill(here / "disk", spare)
            return now

        ran = _run(here, _later(seconds, fault, target))
        after = look(_workdir(here))
        detail = f"{spare:,} bytes left"
        if not ran.phase:
            raise NotTriedError("the run was over before its moment")
        if ran.status == 0:
            return [_row(ran.phase, detail, f"enough, {_SAME_END}", _finished(lab, here, ran))]
        line, problems = complaint(ran)
        if index % 2:  # impatience
            detail += ", and started again before there were more"
            problems += complaint(_run(here))[1]
        (here / "disk" / "filler").unlink(missing_ok=True)
        end = _finish(lab, here, after)
        return [_row(ran.phase, detail, _LINE_THEN_SAME_END, problems + end, line)]


def read_only(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """A disk that is read-only at the start, or folders that become so while a run goes on."""
    if index >= 3:
        return _locked(lab, place, rng, index)
    here = _new_place(lab, place / "run")
    with _small_disk(here / "disk", 64):
        if index:
            source = lab.scratch / ("halfway" if index == 1 else "undisturbed") / "disk"
            shutil.copytree(source, here / "disk", dirs_exist_ok=True)
        before = look(_workdir(here))
        _command("mount", "-o", "remount,ro", here / "disk")
        line, problems = complaint(_run(here))
        _command("mount", "-o", "remount,rw", here / "disk")
        problems += _finish(lab, here, before)
    fell_in = ("before the start", "halfway", "finished")[index]
    return [_row(fell_in, "read-only disk", _LINE_THEN_SAME_END, problems, line)]


def _locked(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """Takes the right to change the workdir, or its checkpoints only, from a run that goes on."""
    here = _new_place(lab, place / "run")
    locked = _workdir(here) / ("" if index % 2 else "checkpoints")

    def fault(process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
        del process
        now = phase_now()
        _command("chattr", "+i", locked)
        return now

    target = ("compiling", "steps", "save")[index % 3]
    try:
        ran = _run(here, _later(rng.uniform(0, 0.5), fault, target))
    finally:
        if locked.exists():
            _command("chattr", "-i", locked)
    after = look(_workdir(here))
    line, problems = complaint(ran)
    problems += _finish(lab, here, after)
    detail = f"no changes in {locked.relative_to(here / 'disk')} from then on"
    return [_row(ran.phase, detail, _LINE_THEN_SAME_END, problems, line)]


def not_a_number(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """A batch of which the model makes NaN, in runs that stop there, or skip such steps."""
    non_finite = ("stop", "skip")[index % 2]
    bad = rng.randrange(1, NUM_STEPS + 1)
    here = _new_place(lab, place / "run")
    words = (f"{ROOT}/experiments/poisoned.py", f"--poisoned_step={bad}")
    ran = _run(here, words=words, **{"train.non_finite": non_finite})
    after = look(_workdir(here))
    detail = f"at step {bad}, train.non_finite={non_finite}"
    if non_finite == "stop":
        line, problems = complaint(ran)
        if f" at step {bad}," not in line:
            problems.append("the line does not name the step")
        good = (bad - 1) // EVAL_EVERY * EVAL_EVERY
        if after.newest != good:
            problems.append(f"the newest checkpoint is {after.newest}, not {good}")
        problems += _finish(lab, here, after)
        return [_row("steps", detail, _LINE_THEN_SAME_END, problems, line)]
    said = strays(ran.log)
    line = said[0] if said else ""
    problems = [f"exit status {ran.status}"] if ran.status != 0 else []
    if len(said) != 1 or f" at step {bad}," not in line:
        problems.append(f"{len(said)} lines instead of one that names the step")
    if not problems:
        problems += _skipped(lab, _workdir(here), bad)
    return [
        _row("steps", detail, "one step skipped and said so, parameters finite", problems, line)
    ]


def _skipped(lab: Lab, run: Path, bad: int) -> list[str]:
    """What is wrong with a finished run that had to skip one step."""
    problems = []
    entries = logs.read_metrics(run / "metrics.jsonl")
    window = -(-bad // _RUN["train.log_every"]) * _RUN["train.log_every"]
    skipped = [[entry["step"], entry["skipped"]] for entry in entries if "skipped" in entry]
    if skipped != [[window, 1]]:
        problems.append(f"metrics.jsonl has as skipped {skipped}")
    before = [row for row in lab.end["curve"] if row[0] < window]
    if ending(run)["curve"][: len(before)] != before:
        problems.append("another curve before that step")
    config = read(run / "config.json")
    abstract_state = steps.abstract_state(
        config, models.build_model(config), steps.make_optimizer(config)
    )
    state, _ = checkpoints.restore(run / "checkpoints", NUM_STEPS, abstract_state)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
        problems.append("parameters that are not finite")
    return problems


def one_of_two(lab: Lab, place: Path, rng: random.Random, index: int) -> list[Row]:
    """SIGKILL or SIGTERM to one of two processes, once training has begun."""
    target = ("compiling", "steps", "save", "validation")[index // 2 % 4]
    victim, fault = (index // 2 + index // 4) % 2, (_kill, _terminate)[index % 2]
    seconds = rng.uniform(0, {"steps": 2.0, **_TARGETS}.get(target, 0.2))
    here = _new_place(lab, place / "run")
    over = _run_two(here, _later(seconds, fault, target), victim)
    fell_in, after = over[0].phase, look(_workdir(here))
    detail = f"{fault.__name__[1:]} process {victim}, {seconds:.2f} s into {target}"
    if not fell_in:
        raise NotTriedError("the run was over before its moment")
    other = over[1 - victim]
    if fault is _kill:
        said = strays(other.log)
        ours = [line for line in said if line.startswith("error: another process of this run")]
        how = "only lines of JAX's"
        if ours:
            how = "one clear line" + (" beside JAX's own" if len(said) > 1 else "")
        outcome = f"the other ended by itself, {how}, then {_SAME_END}"
        detail += f"; the other: exit status {other.status} after {other.seconds:.1f} s"
        line = (ours or said or [""])[0]
        problems = ["the other hung"] if other.status is None else []
        problems += ["the other ended as if all were well"] if other.status == 0 else []
    else:
        saved = re.search(r"stopped after step (\d+); saved", over[0].log)
        line = saved[0] if saved else ""
        outcome = f"both stopped at one step, then {_SAME_END}" if saved else _SAME_END
        problems = [f"exit status {ran.status}" for ran in over if ran.status != 0]
        problems += [f"said: {text}" for ran in over for text in strays(ran.log)[:1]]
        if saved and int(saved[1]) != after.newest:
            problems.append(f"the newest checkpoint is {after.newest}")
    return [_row(fell_in, detail, outcome, problems + _finish(lab, here, after), line)]


# Each makes one trial in a folder of its own: the rows of what it tried and what came of it.
FAULTS: dict[str, Callable[[Lab, Path, random.Random, int], list[Row]]] = {
    "kill": kills,
    "term": terminations,
    "truncate": functools.partial(damage, truncate),
    "flip": functools.partial(damage, flip),
    "empty": functools.partial(damage, empty),
    "full-disk": full_disk,
    "read-only": read_only,
    "nan": not_a_number,
    "one-of-two": one_of_two,
}
# But for kill, whose number is asked for.
_TRIALS = {
    "term": 5,
    "truncate": 3,
    "flip": 8,
    "empty": 2,
    "full-disk": 7,
    "read-only": 6,
    "nan": 4,
    "one-of-two": 8,
}


def _make_lab(scratch: Path) -> Lab:
    """Prepares the data, finishes undisturbed runs, and has one killed halfway."""
    for name in ("data", "cache"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    lab = Lab(scratch, {}, 0.0)
    places = [_new_place(lab, scratch / name) for name in ("undisturbed", "again")]
    say("running undisturbed, thrice")
    _run(places[0])  # alone: it makes the data and the compiled programs
    _new_place(lab, places[0])
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        over = list(pool.map(_run, places))
    seconds = time.monotonic() - start
    for ran in over:
        if ran.status != 0:
            raise UserError(f"an undisturbed run failed: {' '.join(strays(ran.log)[-1:])}")
    ends = [ending(_workdir(place)) for place in places]
    if differences(*ends):
        raise UserError(
            f"two undisturbed runs differ ({'; '.join(differences(*ends))}): nothing can be "
            "compared on this machine"
        )

    def halfway(process: subprocess.Popen, phase_now: Callable[[], str]) -> str:
        directory = _workdir(scratch / "halfway") / "checkpoints"
        _wait(process, lambda: max(checkpoints.steps(directory), default=0) >= _HALFWAY)
        return _kill(process, phase_now)

    _run(_new_place(lab, scratch / "halfway"), halfway)
    return Lab(scratch, ends[0], seconds)


def _make_lab_of_two(scratch: Path) -> Lab:
    """Has two processes finish an undisturbed run."""
    for name in ("data", "cache"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    lab = Lab(scratch, {}, 0.0, 2)
    place = _new_place(lab, scratch / "two")
    say("running two processes undisturbed")
    start = time.monotonic()
    over = _run_two(place)
    if any(ran.status != 0 for ran in over):
        said = [line for ran in over for line in strays(ran.log)]
        statuses = " and ".join(str(ran.status) for ran in over)
        raise UserError(f"two undisturbed processes ended with {statuses}: {' '.join(said[-1:])}")
    return lab._replace(end=ending(_workdir(place)), seconds=time.monotonic() - start)


def _try(lab: Lab, fault: str, index: int) -> list[Row]:
    """One trial; what it leaves is deleted unless something was wrong."""
    place = lab.scratch / "trials" / f"{fault}-{index}"
    rng = random.Random(f"{_SEED.value} {fault} {index}")
    try:
        rows = FAULTS[fault](lab, place, rng, index)
    except NotTriedError as error:
        rows = [{**_row("", "", f"not tried: {error}", []), "ok": None}]
    if all(row["ok"] is not False for row in rows):
        shutil.rmtree(place, ignore_errors=True)
    named = [{"fault": fault, "trial": index, **row} for row in rows]
    # Where the scratch folder lies is nobody else's business.
    return json.loads(json.dumps(named).replace(str(lab.scratch), "DIR"))


def table(rows: list[Row]) -> str:
    """The outcomes, counted by fault and phase."""
    counts = collections.Counter(
        (row["fault"], row["phase"] or "-", row["ok"], row["outcome"]) for row in rows
    )
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [f"{'fault':11}{'phase':18}{'trials':>6}  outcome"]
    for (fault, fell_in, ok, outcome), count in sorted(counts.items(), key=str):
        lines.append(f"{fault:11}{fell_in:18}{count:6}  {words[ok]}: {outcome[:100]}")
    return "\n".join(lines)


def main() -> None:
    """Tries the faults that are not done yet, prints the table and writes the JSON."""
    names = list(FAULTS) if _FAULTS.value == ["all"] else _FAULTS.value
    for name in names:
        one_of("faults", name, FAULTS)
    num_kills = _KILLS_A_TRIAL if _SMALL.value else _KILLS.value
    numbers = {
        **({name: 1 for name in _TRIALS} if _SMALL.value else _TRIALS),
        "kill": -(-num_kills // _KILLS_A_TRIAL),
    }
    scratch = Path(_DIR.value).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    header = {
        "what": "faults in short runs, and whether these still end with the same bits",
        **provenance(1),
        "seed": _SEED.value,
    }
    memory = scratch / "done.json"
    done: dict[str, list[Row]] = {}
    if memory.exists():
        record = json.loads(memory.read_text())
        if record["header"] == header and not header["commit"].endswith("-dirty"):
            done = record["done"]
        else:
            say(f"{memory} is of other code or settings; beginning anew")
    wanted = [(name, index) for name in names for index in range(numbers[name])]
    missing = [one for one in wanted if "{}-{}".format(*one) not in done]
    random.Random(_SEED.value).shuffle(missing)  # long and short mixed, for the time left
    of_two = [one for one in missing if one[0] == "one-of-two"]
    of_one = [one for one in missing if one[0] != "one-of-two"]
    for some, make_lab, workers in (
        (of_one, _make_lab, _WORKERS),
        (of_two, _make_lab_of_two, _WORKERS // 2),
    ):
        if not some:
            continue
        lab = make_lab(scratch)
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            futures = {pool.submit(_try, lab, *one): "{}-{}".format(*one) for one in some}
            completed = concurrent.futures.as_completed(futures)
            for future in track(completed, len(some), "faults", "trials"):
                name = futures[future]
                done[name] = future.result()
                for row in done[name]:
                    if row["ok"] is False:
                        say(f"FAILED {name} in {row['phase']}, {row['detail']}: {row['outcome']}")
                write_json(memory, {"header": header, "done": done})
        finally:
            pool.shutdown(cancel_futures=True)  # those that have begun are finished
    rows = [row for one in wanted for row in done["{}-{}".format(*one)]]
    print(table(rows))
    failed = sum(row["ok"] is False for row in rows)
    write_json(Path(_OUT.value), {**header, "tried": len(rows), "failed": failed, "rows": rows})
    if failed:
        print(f"{failed} of {len(rows)} failed; their logs are in {scratch}/trials")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
