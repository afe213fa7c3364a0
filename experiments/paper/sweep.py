r"""Trains a grid of task x attention x seed, and makes the table of a reproduction.

    python -m experiments.paper.sweep --configs=listops,text --attentions=softmax,skyformer \
        --seeds=0,1 --variant=small --set=text:data.source=DIR --set=train.num_steps=200 --workers=2

Without flags it trains the paper's table 1: five tasks, nine attentions, three seeds. Other flags:

    --small            uses the reduced setting for a CPU (grid.py): some minutes per cell
    --devices=0,1,2,3  uses a GPU for each of four workers; --devices=0 --workers=3 shares one
    --together         trains all seeds of a config and attention in one program, for an accelerator
    --idle             trains at the lowest priority, beside other work
    --table            makes the table of the finished cells, and starts nothing
    --add              keeps the finished cells in --out that are not in this grid
    --commit=NAME      records this commit, on a machine without git
    --slurm=sweep.sh   writes a script for sbatch, which trains each cell in a job of a cluster

A cell is a run of train.py in DIR/<config>-<attention>[-<variant>]-seed<k>, with its standard error
in train.log there. With --together the seeds of a config and attention are one run of train.py in
DIR/<config>-<attention>[-<variant>], and the cells are its folders seed-<k>; the seeds must be
consecutive. With a single seed, --together changes nothing.

--add assembles a table from several commands, which may have other seeds, attentions, configs and
--set, and may run on other machines. A kept cell of a config and attention of this grid must have
this command's setting; a cell of another config or attention is kept as it is.

The same command again skips the finished cells and continues the others from their checkpoints. A
result of another config than the one asked for is refused, never counted.
While a file DIR/pause exists, the running cells are paused, so that something else can be timed.
SIGTERM or Ctrl-C lets the running cells save and stop (a second Ctrl-C stops them at once). If the
sweep itself is killed, its cells continue to train; the next start waits for them instead of
starting them twice. Exit status: 0, 1 if a cell failed, 128 + signal if stopped.

Rewrites --out after each cell. It has the flags' settings and the provenance of this command;
"cells"; and a "summary" of the finished ones. Each cell has its status (failed cells are tried
again next time, refused ones are not); its variant and departures ({field: [full setting, here]},
empty if the run is not reduced; variants "paper" and "fast" are full settings of their own); the
result in eval_test.json; the wall time of all attempts in seconds; the provenance of the last
attempt; and seeds_at_once, the number of seeds that share these seconds, more than 1 only with
--together. After --add, "variant", "overrides" and the provenance at the top are those of the last
command only; the variant, departures and provenance of each cell are authoritative.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import flags

from experiments.paper import grid_flags, workers
from experiments.paper.cell_results import (
    TRAINABLE,
    in_order,
    read_cell,
    read_others,
    summarise,
    table,
    to_train,
)
from experiments.paper.grid import CONFIGS, NOT_SETTING, Cell
from experiments.paper.report.statistics import group
from experiments.paper.slurm import slurm_script
from experiments.records import Row, write_json
from skyformer_jax import cli
from skyformer_jax.errors import UserError
from skyformer_jax.progress import open_bar, say
from skyformer_jax.training.logs import read_metrics

flags.adopt_module_key_flags(grid_flags)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Cells trained at a time; default: one, or one per device.", lower_bound=1
)
_DEVICES = flags.DEFINE_list(
    "devices", [], "GPUs, as in CUDA_VISIBLE_DEVICES, distributed over the workers."
)
_IDLE = flags.DEFINE_bool("idle", False, "Train at the lowest priority, beside other work.")
_TABLE = flags.DEFINE_bool("table", False, "Train nothing: write the table of the finished cells.")
_ADD = flags.DEFINE_bool(
    "add", False, "Keep the finished cells in --out that are not in this grid."
)
_CELL = flags.DEFINE_integer("cell", None, "Train only the cell with this index.", lower_bound=0)
_COMMIT = flags.DEFINE_string("commit", "", "Commit to record, for a machine without git.")
_SLURM = flags.DEFINE_string(
    "slurm", None, "Train nothing: write a Slurm script with a job for each cell to this file."
)


def _train(
    cells: Sequence[Cell],
    rows: dict[Path, Row],
    environments: Sequence[dict[str, str]],
    provenance: dict[str, Any],
    signals: list[int],
) -> Iterator[None]:
    """Trains the unfinished cells, keeps rows up to date, and reports the progress.

    Yields:
      None, whenever the rows are to be written: after each cell and at the end.
    """
    todo = to_train(cells, rows)
    for cell in todo:
        if rows[cell.workdir]["status"] in TRAINABLE:  # failed cells are tried again
            rows[cell.workdir].update(status="unfinished", error=None)

    def count(status: str) -> int:
        return sum(row["status"] == status for row in rows.values())

    def count_steps() -> tuple[int, int]:
        """Returns the steps taken and the steps in all, of the cells that have not failed."""
        done = total = 0
        for cell in todo:
            row = rows[cell.workdir]
            if row["status"] == "finished":
                done += row["num_steps"]
            elif row["status"] == "unfinished":
                entries = read_metrics(cell.workdir / "metrics.jsonl")
                done += entries[-1]["step"] if entries else 0
            else:
                continue
            total += row["num_steps"]
        return done, total

    before, total = count_steps()
    start, bar = time.monotonic(), open_bar(total, initial=before, unit=" steps", unit_scale=True)
    with contextlib.closing(bar) if bar else contextlib.nullcontext():
        pause = Path(grid_flags.DIR.value) / "pause"
        for ended in workers.train_cells(
            todo, environments, provenance, signals, idle=_IDLE.value, pause=pause
        ):
            for cell in ended:
                rows[cell.workdir] = row = read_cell(cell)
                done, total = count_steps()
                rate = max(done - before, 0) / (time.monotonic() - start)
                eta = tqdm.tqdm.format_interval((total - done) / rate) if rate else "unknown"
                outcome = f"{row['status']}: {row['error']}" if row["error"] else "stopped"
                if row["status"] == "finished":
                    outcome = f"accuracy {100 * row['accuracy']:.2f} %"
                say(
                    f"{cell.name}: {outcome}; {count('finished')} of {len(rows)} cells "
                    f"finished, {count('unfinished')} left, ETA {eta}"
                )
                yield
            if bar is not None:
                done, bar.total = count_steps()
                bar.update(done - bar.n)
        yield


def _write_slurm(cells: Sequence[Cell], directory: Path) -> None:
    of_grid = ("configs", "attentions", "seeds", "variant", "small", "set", "dir", "out")
    given = "\n".join(flags.FLAGS[name].serialize() for name in (*of_grid, "add", "commit"))
    command = [sys.executable, "-m", "experiments.paper.sweep", *filter(None, given.split("\n"))]
    path = Path(_SLURM.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(slurm_script(command, len(cells), _WORKERS.value, directory, Path.cwd()))
    say(f"sbatch {path} trains {len(cells)} cells; its first lines say how to make the table")


def _write(rows: Sequence[Row], header: dict[str, Any]) -> None:
    result = {
        "what": "test accuracy of the best checkpoint by validation, for each attention and seed",
        **header,
        "configs": [name for name in CONFIGS if name in group(rows, "config")],
        "attentions": list(group(rows, "attention")),
        "seeds": list(group(rows, "seed")),
        "variant": grid_flags.variant(),
        "overrides": [
            text
            for text in grid_flags.overrides()
            if not text.partition("=")[0].rpartition(":")[2].startswith(NOT_SETTING)
        ],
        "cells": rows,
        "summary": summarise(rows),
    }
    write_json(Path(grid_flags.OUT.value), result)


def main() -> None:
    """Trains the unfinished cells, writes the JSON after each, and prints the table."""
    alone = _CELL.value is not None
    if grid_flags.TOGETHER.value and (alone or _SLURM.value):
        name = "cell" if alone else "slurm"
        raise UserError(f"--{name} trains each cell in its own process; leave out --together")
    directory, cells = Path(grid_flags.DIR.value), grid_flags.make_cells()
    if Path(grid_flags.OUT.value).is_dir():
        raise UserError(f"--out={grid_flags.OUT.value} is a folder; name a file")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        text = f"--dir={directory}: this, or a folder above it, is a file; name a folder"
        raise UserError(text) from None
    if _SLURM.value:
        return _write_slurm(cells, directory)
    if alone:
        if _CELL.value >= len(cells):
            raise UserError(f"--cell={_CELL.value}: the grid has cells 0..{len(cells) - 1}")
        cells = [cells[_CELL.value]]
    others = read_others(Path(grid_flags.OUT.value), cells) if _ADD.value and not alone else []
    rows = {cell.workdir: read_cell(cell) for cell in cells}
    for cell in cells:
        if rows[cell.workdir]["status"] == "refused":
            say(f"{cell.name}: refused: {rows[cell.workdir]['error']}")
    finished = sum(row["status"] == "finished" for row in rows.values())
    kept = f"; {len(others)} others are kept" if others else ""
    say(f"{finished} of {len(cells)} cells are finished{kept}")

    def all_rows() -> list[Row]:
        return in_order([*others, *rows.values()])

    environments = workers.make_environments(_WORKERS.value, _DEVICES.value)
    header = workers.find_provenance(environments[0])
    header["commit"] = _COMMIT.value or header["commit"]
    with workers.stop_signals() as signals:
        for _ in [None] if _TABLE.value else _train(cells, rows, environments, header, signals):
            if not alone:  # jobs of an array would overwrite each other's file
                _write(all_rows(), header)
    if not alone:
        print(table(all_rows()))
    if signals:
        say("stopped; start the same command to go on")
        sys.exit(128 + signals[0])
    failed = [c.name for c in cells if rows[c.workdir]["status"] in ("failed", "refused")]
    if failed:
        names = ", ".join(failed)
        say(f"{len(failed)} cells failed: {names}; see train.log in the folders of their runs")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
