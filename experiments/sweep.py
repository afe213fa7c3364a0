r"""Trains a grid of task x attention x seed, and makes the table that a reproduction reports from.

    python experiments/sweep.py --configs=listops,text --attentions=softmax,skyformer --seeds=0,1 \
        --variant=small --set=text:data.source=DIR --set=train.num_steps=200 --workers=2

Without flags it is the paper's table 1: five tasks, nine attentions, three seeds. With those above:

    --small            a grid for a CPU: the variant small, still shorter; some minutes a cell
    --devices=0,1,2,3  a GPU for each of four workers; --devices=0 --workers=3 shares one
    --table            makes the table of what there is so far, and starts nothing
    --add              keeps the other seeds that --out has, trained elsewhere in this setting
    --slurm=sweep.sh   writes a script for sbatch, which trains each cell in a job of a cluster

A cell is a run of train.py in DIR/<config>-<attention>[-<variant>]-seed<k>, with its standard error
in train.log there. The same command again skips the finished cells and goes on with the others,
which train.py continues from their checkpoints. A result of another config than the one asked for
is refused, never counted. SIGTERM or Ctrl-C lets the running cells save and stop (a second Ctrl-C
does not wait for that). If the sweep itself is killed its cells train on; the next start waits for
them instead of starting them twice. Exit status: 0, 1 if a cell failed, 128 + signal if stopped.

Writes --out anew after each cell. Beside provenance (of the process that wrote it):

    configs, attentions, seeds, variant, overrides   what was asked for; locations are left out
    cells     one entry for each cell, all with the same fields, null where not known:
        config, attention, seed
        status         finished, unfinished, failed (tried again next time) or refused (is not)
        error          one line, if failed or refused
        num_steps, batch_size
        departures     {field: [full setting, this cell]}, empty if the run is not a reduced one;
                       variant "paper" is a full setting of its own
        task, examples, accuracy, interval_95, loss, checkpoint, floors, data   of eval_test.json
        validation_accuracy   of that checkpoint
        seconds        wall time of all attempts that a sweep saw the end of, all included
        attempts       how many these were
        provenance     commit, versions, device and cores of the last of them
    summary   for each config and attention, over its finished cells: num_seeds, mean,
              standard_deviation (of a sample: n - 1), standard_error; null where undefined
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tqdm
from absl import flags

from experiments import grid_flags
from experiments.grid import (
    NOT_SETTING,
    ROOT,
    TRAINABLE,
    Cell,
    read_cell,
    read_others,
    summarise,
    table,
)
from experiments.provenance import write_json
from skyformer_jax import cli
from skyformer_jax.errors import UserError
from skyformer_jax.progress import open_bar, say

_SECONDS_BETWEEN_LOOKS = 0.5

flags.adopt_module_key_flags(grid_flags)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Cells trained at a time; default: one, or one a device.", lower_bound=1
)
_DEVICES = flags.DEFINE_list(
    "devices", [], "GPUs, as CUDA_VISIBLE_DEVICES has them, dealt to the workers."
)
_TABLE = flags.DEFINE_bool("table", False, "Train nothing: write the table of what is finished.")
_ADD = flags.DEFINE_bool("add", False, "Keep the cells of other seeds that --out has.")
_CELL = flags.DEFINE_integer("cell", None, "Train this cell of the grid alone.", lower_bound=0)
_SLURM = flags.DEFINE_string(
    "slurm", None, "Train nothing: write a Slurm script with a job for each cell to this file."
)


def slurm_script(
    command: Sequence[str], num_cells: int, at_a_time: int | None, directory: Path, cwd: Path
) -> str:
    """A Slurm job array that trains each cell in a job with a GPU.

    Args:
      command: of this script, without --cell.
      num_cells: jobs in the array.
      at_a_time: most that run at once; None leaves that to the cluster.
      directory: gets the jobs' logs; Slurm does not make it.
      cwd: where the command is to be run.
    """
    limit = f"%{at_a_time}" if at_a_time else ""
    return f"""#!/bin/bash
# sbatch [--partition=NAME --time=HH:MM:SS ...] THIS_FILE; then, for the table:
# {shlex.join([*command, "--table"])}
#SBATCH --job-name=sweep
#SBATCH --array=0-{num_cells - 1}{limit}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --output="{directory.absolute()}/slurm-%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

cd {shlex.quote(str(cwd))} || exit 1
# In the background, as bash runs a trap only once what is in front has ended.
{shlex.join(command)} --cell="$SLURM_ARRAY_TASK_ID" &
sweep=$!
# USR1: the time is nearly up. TERM: preempted or cancelled. Either way the cell saves and stops.
trap 'received=USR1; kill -TERM "$sweep"' USR1
trap 'received=TERM; kill -TERM "$sweep"' TERM
while true; do  # a trap ends wait, too
    wait "$sweep"
    status=$?
    kill -0 "$sweep" 2>/dev/null || break
done
if [ "$status" -ne 0 ] && [ "$received" = USR1 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
elif [ "$status" -ne 0 ] && [ "$received" = TERM ]; then
    sleep 600  # Slurm may requeue a preempted job only if it has to end it
fi
exit "$status"
"""


@dataclasses.dataclass
class _Attempt:
    """A cell that a worker is at; without a process, it waits for another's."""

    cell: Cell
    process: subprocess.Popen | None
    started: float
    log_start: int = 0


def _is_held(workdir: Path) -> bool:
    """Whether a process is training there, by the lock of train.py."""
    path = workdir / "lock"
    if not path.exists():
        return False
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start(cell: Cell, environment: dict[str, str]) -> _Attempt:
    if _is_held(cell.workdir):
        say(f"{cell.workdir.name}: another process is training it; waiting for that to end")
        return _Attempt(cell, None, time.monotonic())
    cell.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *cell.arguments, f"--workdir={cell.workdir}"]
    with (cell.workdir / "train.log").open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            process_group=0,  # a terminal's Ctrl-C goes to the sweep alone, which passes it on once
        )
    return _Attempt(cell, process, time.monotonic(), log_start)


def _error(attempt: _Attempt) -> str:
    """In one line, why the attempt did not finish its cell."""
    with (attempt.cell.workdir / "train.log").open("rb") as log:
        log.seek(attempt.log_start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if own:
        return own[-1]
    code = attempt.process.returncode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"{how} after: {lines[-1]}" if lines else how


def _end(attempt: _Attempt, provenance: dict[str, Any], stopping: bool) -> None:
    """Records an attempt in its cell's folder, sweep.json."""
    path = attempt.cell.workdir / "sweep.json"
    before = json.loads(path.read_text()) if path.exists() else {"seconds": 0, "attempts": 0}
    ended = (attempt.cell.workdir / "eval_test.json").exists()
    stopped = stopping and attempt.process.returncode <= 0
    record = {
        "seconds": round(before["seconds"] + time.monotonic() - attempt.started, 1),
        "attempts": before["attempts"] + 1,
        "error": None if ended or stopped else _error(attempt),
        "provenance": provenance,
    }
    write_json(path, record)


def train_cells(
    cells: Sequence[Cell],
    environments: Sequence[dict[str, str]],
    provenance: dict[str, Any],
    signals: list[int],
) -> Iterator[list[Cell]]:
    """Trains the cells, one at a time in each environment.

    Args:
      cells: not finished.
      environments: of the workers' processes.
      provenance: for the records of the cells.
      signals: that were received; the first one stops the runs, as SIGTERM, once they have saved,
        and a further SIGINT at once.

    Yields:
      From time to time, the cells that have ended since.
    """
    pending, at_work, passed_on = collections.deque(cells), {}, 0
    while at_work or (pending and not signals):
        for worker, environment in enumerate(environments):
            if pending and worker not in at_work and not signals:
                at_work[worker] = _start(pending.popleft(), environment)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        while passed_on < len(signals):
            number, first = signals[passed_on], passed_on == 0
            passed_on += 1
            if first:
                say(f"{signal.Signals(number).name}: the running cells save and stop")
            # A scheduler may send SIGTERM repeatedly; a second one would keep train.py from saving.
            if first or number == signal.SIGINT:
                for attempt in at_work.values():
                    if attempt.process is not None:
                        attempt.process.send_signal(signal.SIGTERM)
        ended = []
        for worker, attempt in list(at_work.items()):
            if attempt.process is None:
                if not signals and _is_held(attempt.cell.workdir):
                    continue
                if not signals and read_cell(attempt.cell)["status"] in TRAINABLE:
                    at_work[worker] = _start(attempt.cell, environments[worker])
                    continue
            elif attempt.process.poll() is None:
                continue
            elif attempt.process.returncode and not signals and _is_held(attempt.cell.workdir):
                # A process of an earlier sweep had not yet got to its lock when we looked.
                at_work[worker] = _start(attempt.cell, environments[worker])
                continue
            else:
                _end(attempt, provenance, bool(signals))
            ended.append(attempt.cell)
            del at_work[worker]
        yield ended


def make_environments(workers: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """The environments of the workers: each sees one of the devices, where devices are given."""
    workers = workers or len(devices) or 1
    if not devices:
        return [dict(os.environ)] * workers
    environments = []
    for worker in range(workers):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices[worker % len(devices)]}
        if workers > len(devices):
            share = 0.9 / math.ceil(workers / len(devices))
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
        environments.append(environment)
    return environments


def _find_provenance(environment: dict[str, str]) -> dict[str, Any]:
    """What a worker runs on, asked of a process that ends: this one must not take a GPU's memory.

    Raises:
      UserError: if JAX does not start there.
    """
    program = (
        "import json, jax; from experiments.provenance import provenance; "
        "print(json.dumps(provenance(jax.device_count())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"JAX does not start: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are appended to."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        del frame
        received.append(number)

    old = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _last_step(cell: Cell) -> int:
    """The step that the cell's metrics have got to."""
    try:
        with (cell.workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            whole_lines = file.read().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return json.loads(whole_lines[-1])["step"] if whole_lines else 0


def _count_steps(cells: Sequence[Cell], rows: dict[Path, dict[str, Any]]) -> tuple[int, int]:
    """Steps that are taken, and in all, of the cells that have not failed."""
    done = total = 0
    for cell in cells:
        row = rows[cell.workdir]
        if row["status"] in ("finished", "unfinished"):
            finished = row["status"] == "finished"
            done += row["num_steps"] if finished else _last_step(cell)
            total += row["num_steps"]
    return done, total


def _train(
    cells: Sequence[Cell],
    rows: dict[Path, dict[str, Any]],
    environments: Sequence[dict[str, str]],
    provenance: dict[str, Any],
    signals: list[int],
) -> Iterator[None]:
    """Trains what is to be trained, keeps rows up to date, and says how far it is.

    Yields:
      When rows may be written: after each cell and at the end.
    """
    todo = [cell for cell in cells if rows[cell.workdir]["status"] in TRAINABLE]
    for cell in todo:  # what failed before is tried again
        rows[cell.workdir].update(status="unfinished", error=None)
    before, total = _count_steps(todo, rows)
    start, bar = time.monotonic(), open_bar(total, initial=before, unit=" steps", unit_scale=True)
    with contextlib.closing(bar) if bar else contextlib.nullcontext():
        for ended in train_cells(todo, environments, provenance, signals):
            for cell in ended:
                rows[cell.workdir] = row = read_cell(cell)
                done, total = _count_steps(todo, rows)
                rate = max(done - before, 0) / (time.monotonic() - start)
                eta = tqdm.tqdm.format_interval((total - done) / rate) if rate else "unknown"
                finished = sum(row["status"] == "finished" for row in rows.values())
                left = sum(rows[cell.workdir]["status"] == "unfinished" for cell in todo)
                say(
                    f"{cell.workdir.name}: {_outcome(row)}; {finished} of {len(rows)} cells "
                    f"finished, {left} left, ETA {eta}"
                )
                yield
            if bar is not None:
                done, bar.total = _count_steps(todo, rows)
                bar.update(done - bar.n)
        yield


def _outcome(row: dict[str, Any]) -> str:
    if row["status"] == "finished":
        return f"accuracy {100 * row['accuracy']:.2f} %"
    return f"{row['status']}: {row['error']}" if row["error"] else "stopped"


def _command() -> list[str]:
    """This command, with what decides the grid."""
    given = {
        "configs": ",".join(grid_flags.CONFIGS.value),
        "attentions": ",".join(grid_flags.ATTENTIONS.value),
        "seeds": ",".join(grid_flags.SEEDS.value),
        "variant": grid_flags.variant(),
        "dir": grid_flags.DIR.value,
        "out": grid_flags.OUT.value,
    }
    pairs = [*given.items(), *(("set", text) for text in grid_flags.overrides())]
    flags_given = [f"--{name}={value}" for name, value in pairs] + ["--add"] * _ADD.value
    return [sys.executable, str(Path(__file__).resolve()), *flags_given]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--dir={path}: that, or what it is in, is a file; name a folder") from None


def _write_slurm(cells: Sequence[Cell], directory: Path) -> None:
    path = Path(_SLURM.value)
    script = slurm_script(_command(), len(cells), _WORKERS.value, directory, Path.cwd())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    say(f"sbatch {path} trains {len(cells)} cells; its first lines say how to make the table")


def _write(rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> None:
    overrides = [
        text
        for text in grid_flags.overrides()
        if not text.partition("=")[0].rpartition(":")[2].startswith(NOT_SETTING)
    ]
    result = {
        "what": "test accuracy of the best checkpoint by validation, for each attention and seed",
        **header,
        "configs": list(dict.fromkeys(row["config"] for row in rows)),
        "attentions": list(dict.fromkeys(row["attention"] for row in rows)),
        "seeds": list(dict.fromkeys(row["seed"] for row in rows)),
        "variant": grid_flags.variant(),
        "overrides": overrides,
        "cells": rows,
        "summary": summarise(rows),
    }
    write_json(Path(grid_flags.OUT.value), result)


def main() -> None:
    """Trains what is not finished, writes the JSON after each cell, and prints the table."""
    directory, cells = Path(grid_flags.DIR.value), grid_flags.make_cells()
    if Path(grid_flags.OUT.value).is_dir():
        raise UserError(f"--out={grid_flags.OUT.value} is a folder; name a file")
    _make_folder(directory)
    if _SLURM.value:
        return _write_slurm(cells, directory)
    alone = _CELL.value is not None
    if alone:
        if _CELL.value >= len(cells):
            raise UserError(f"--cell={_CELL.value}: the grid has cells 0..{len(cells) - 1}")
        cells = [cells[_CELL.value]]
    others = read_others(Path(grid_flags.OUT.value), cells) if _ADD.value and not alone else []
    rows = {cell.workdir: read_cell(cell) for cell in cells}
    for workdir, row in rows.items():
        if row["status"] == "refused":
            say(f"{workdir.name}: refused: {row['error']}")
    finished = sum(row["status"] == "finished" for row in rows.values())
    kept = f"; {len(others)} of other seeds are kept" if others else ""
    say(f"{finished} of {len(cells)} cells are finished{kept}")

    def in_order() -> list[dict[str, Any]]:
        return sorted([*others, *(rows[cell.workdir] for cell in cells)], key=lambda r: r["seed"])

    environments = make_environments(_WORKERS.value, _DEVICES.value)
    header = _find_provenance(environments[0])
    with _stop_signals() as signals:
        for _ in [None] if _TABLE.value else _train(cells, rows, environments, header, signals):
            if not alone:  # jobs of an array would overwrite each other's
                _write(in_order(), header)
    if not alone:
        print(table(in_order()))
    if signals:
        say("stopped; start the same command to go on")
        sys.exit(128 + signals[0])
    failed = [w.name for w, row in rows.items() if row["status"] in ("failed", "refused")]
    if failed:
        say(f"{len(failed)} cells failed: {', '.join(failed)}; see train.log in their folders")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
