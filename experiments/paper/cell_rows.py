"""Measures the cells of the flags' grid, one row per cell, and resumes where it stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.paper import grid_flags
from experiments.paper.grid import Cell
from experiments.records import Row, as_read, provenance, resume, write_json
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say, track


def keep_rows(
    what: str,
    settings: dict[str, Any],
    measure: Callable[[Cell], Row],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Measures the cells that the JSON of --out lacks, and writes it after each.

    Args:
      what: what is measured, for the JSON and, up to a comma or bracket, for the progress bar.
      settings: settings beside the flags of the grid. An earlier result with other settings is
        started over.
      measure: returns the fields of a cell's row beside its setting, including "provenance". A
        UserError skips the cell and is its row's "skipped"; the next call tries it again.
      draw: draws the picture of a result to a path.
    """
    path, cells = Path(grid_flags.OUT.value), grid_flags.make_cells()
    header = {
        "what": what,
        **provenance(jax.device_count()),
        "variant": grid_flags.variant(),
        **settings,
    }
    rows = {}
    for row in resume(path, header, any_commit=True):
        if "skipped" not in row:
            rows[row["config"], row["attention"], row["seed"]] = row
    for cell in track(cells, len(cells), what.partition(" (")[0].partition(",")[0], "cells"):
        key, departures = (cell.config, cell.attention, cell.seed), as_read(cell.departures)
        if key in rows and rows[key]["departures"] == departures:
            continue
        rows[key] = {
            "config": cell.config,
            "attention": cell.attention,
            "seed": cell.seed,
            "batch_size": cell.asked["train"]["batch_size"],
            "length": cell.asked["model"]["max_length"],
            "departures": departures,
        }
        try:
            rows[key] |= measure(cell)
        except UserError as error:
            rows[key]["skipped"] = str(error)
            say(f"{cell.config}, {cell.attention}: skipped: {error}")
        result = {**header, "rows": list(rows.values())}
        write_json(path, result)
        if any("skipped" not in row for row in rows.values()):
            draw(result, path.with_suffix(".png"))
