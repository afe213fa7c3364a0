"""Goes over the grid of the flags, one row of a result a cell, and on where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments import grid_flags
from experiments.grid import Cell
from experiments.provenance import provenance, write_json
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say, track


def keep_rows(
    what: str,
    settings: dict[str, Any],
    measure: Callable[[Cell], dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Measures the cells that the JSON of --out does not have, and writes it after each.

    Args:
      what: is measured.
      settings: beside the flags of the grid; an earlier result of others is begun anew.
      measure: gives what a cell's row holds beside its setting; a UserError skips the cell, and
        is its row's "skipped".
      draw: makes the picture of a result at a path.
    """
    path, cells = Path(grid_flags.OUT.value), grid_flags.make_cells()
    header = {
        "what": what,
        **provenance(jax.device_count()),
        "variant": grid_flags.variant(),
        **settings,
    }
    rows = _read(path, header)
    for cell in track(cells, len(cells), what.partition(" (")[0].partition(",")[0], "cells"):
        key = (cell.config, cell.attention, cell.seed)
        if key in rows and rows[key]["departures"] == json.loads(json.dumps(cell.departures)):
            continue
        rows[key] = {
            "config": cell.config,
            "attention": cell.attention,
            "seed": cell.seed,
            "batch_size": cell.asked["train"]["batch_size"],
            "length": cell.asked["model"]["max_length"],
            "departures": json.loads(json.dumps(cell.departures)),
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


def _read(path: Path, header: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The rows of an earlier result of the same settings and versions, but those skipped."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    # Each row has the commit that it was measured with.
    different = [
        name
        for name, value in header.items()
        if name != "commit" and before.get(name) != json.loads(json.dumps(value))
    ]
    if different:
        say(f"{path} is of other {', '.join(different)}: begun anew")
        return {}
    return {
        (row["config"], row["attention"], row["seed"]): row
        for row in before["rows"]
        if "skipped" not in row
    }
