"""Reads the results of the cells of a grid, and makes the table of all."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper.grid import Cell, with_settled_kind
from experiments.paper.report.statistics import error_of_mean, group
from experiments.records import Row, as_read, read_json
from skyformer_jax.errors import UserError
from skyformer_jax.training import checkpoints
from skyformer_jax.training import config as configs
from skyformer_jax.training.results import config_digest

TRAINABLE = ("unfinished", "failed")  # statuses; the others are finished and refused


def _read_result(cell: Cell) -> dict[str, Any]:
    """Returns the content of the cell's eval_test.json; empty if the cell is not finished.

    Raises:
      UserError: if the file is damaged, or is the result of another config or of a checkpoint other
        than the best.
    """
    path = cell.workdir / "eval_test.json"
    if not path.exists():
        return {}
    result = read_json(path)
    saved = configs.read(cell.workdir / "config.json")
    asked = with_settled_kind(cell.asked, saved)
    different = configs.differences(configs.to_dict(saved), asked)
    # The digest is that of the evaluated config, in case config.json is from a later attempt.
    if different or result.get("config_digest") != config_digest(saved):
        raise UserError(
            f"{cell.workdir} holds the result of another config; name another --dir, or delete it: "
            + ("; ".join(different) or "eval_test.json is older than config.json")
        )
    folder = cell.workdir / "checkpoints"  # may have been deleted to save space
    if checkpoints.steps(folder) and result["checkpoint"] != checkpoints.find(folder, "best"):
        raise UserError(
            f"{path} is the result of checkpoint {result['checkpoint']}, not the best; "
            f"run {shlex.join(['python', 'eval.py', f'--workdir={cell.workdir}'])}"
        )
    return result


def read_cell(cell: Cell) -> Row:
    """Returns the cell's entry in the JSON, from the files in its folder."""
    record_path = cell.run_dir / "sweep.json"
    record = read_json(record_path) if record_path.exists() else {}
    try:
        result = _read_result(cell)
        error = None if result else record.get("error")
        status = "finished" if result else "failed" if error else "unfinished"
    except UserError as refusal:
        result, error, status = {}, str(refusal), "refused"
    fields = ("examples", "accuracy", "interval_95", "loss", "checkpoint", "floors", "data")
    return {
        "config": cell.config,
        "attention": cell.attention,
        "seed": cell.seed,
        "status": status,
        "error": error,
        "num_steps": cell.asked["train"]["num_steps"],
        "batch_size": cell.asked["train"]["batch_size"],
        "departures": cell.departures,
        "task": cell.asked["task"],
        **{field: result.get(field) for field in fields},
        "validation_accuracy": result.get("validation", {}).get("accuracy"),
        **{field: record.get(field) for field in ("seconds", "attempts", "provenance")},
        "seeds_at_once": cell.seeds_at_once,
    }


def to_train(cells: Sequence[Cell], rows: Mapping[Path, Row]) -> list[Cell]:
    """Returns the cells of the runs that have an unfinished or failed cell, and none refused.

    A run trains all its seeds again, and so would write over a refused result.

    Args:
      cells: the cells.
      rows: the row of each, by workdir.
    """
    statuses: dict[Path, set[str]] = {}
    for cell in cells:
        statuses.setdefault(cell.run_dir, set()).add(rows[cell.workdir]["status"])
    runs = {
        run_dir
        for run_dir, found in statuses.items()
        if "refused" not in found and not found.isdisjoint(TRAINABLE)
    }
    return [cell for cell in cells if cell.run_dir in runs]


def read_others(path: Path, cells: Sequence[Cell]) -> list[Row]:
    """Returns an earlier JSON's finished entries of other seeds than the cells'; none if missing.

    Raises:
      UserError: if the file is not the JSON of a grid, or has finished entries of another setting,
        task or attention.
    """
    if not path.exists():
        return []
    seeds = {cell.seed for cell in cells}
    settings = {(cell.config, cell.attention): as_read(cell.departures) for cell in cells}
    try:
        rows = [row for row in read_json(path)["cells"] if row["status"] == "finished"]
        found = [
            ((row["config"], row["attention"]), row["seed"], row["departures"]) for row in rows
        ]
    except (UserError, KeyError, TypeError):
        raise UserError(f"{path} is not a JSON file of this script; name another --out") from None
    for key, seed, departures in found:
        if departures != settings.get(key):
            raise UserError(
                f"{path} has {' '.join(key)}, seed {seed}, of another setting than this command's, "
                "or not in its grid; name another --out"
            )
    return [row for row in rows if row["seed"] not in seeds]


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns mean and spread of the accuracy over the finished seeds, the JSON's "summary"."""
    summary = []
    for key in dict.fromkeys((row["config"], row["attention"]) for row in rows):
        own = [row for row in rows if (row["config"], row["attention"]) == key]
        found = [row["accuracy"] for row in own if row["status"] == "finished"]
        summary.append(
            {
                "config": key[0],
                "attention": key[1],
                "num_seeds": len(found),
                "mean": statistics.fmean(found) if found else None,
                "standard_deviation": statistics.stdev(found) if len(found) > 1 else None,
                "standard_error": error_of_mean(found),
            }
        )
    return summary


def table(rows: Sequence[Row]) -> str:
    """Formats test accuracy in percent, attentions by configs, and the settings, as Markdown."""
    of_configs, num_seeds = group(rows, "config"), len({row["seed"] for row in rows})
    texts: dict[str, str] = {}
    for entry in summarise(rows):
        text = f"{100 * entry['mean']:.2f}" if entry["num_seeds"] else "-"
        if entry["num_seeds"] > 1:
            text += f" ± {100 * entry['standard_deviation']:.2f}"
        if 0 < entry["num_seeds"] < num_seeds:
            text += f" ({entry['num_seeds']} of {num_seeds})"
        name = entry["attention"]
        texts[name] = texts.get(name, f"| `{name}` |") + f" {text} |"
    header = ["| | " + " | ".join(of_configs) + " |", "|---" * (1 + len(of_configs)) + "|"]
    lines = [*header, *texts.values(), ""]
    for config, own in of_configs.items():
        sizes = {f"{row['num_steps']:,} steps of {row['batch_size']}" for row in own}
        fields = sorted({field for row in own for field in row["departures"]})
        setting = f"departs from the full setting in {', '.join(fields)}" if fields else "full"
        lines.append(f"{config}: {', '.join(sorted(sizes))}; {setting}")
        if len({row["data"]["checksum"] for row in own if row["data"]}) > 1:
            lines.append(f"{config}: WARNING: its cells were evaluated on different data")
    return "\n".join(lines)
