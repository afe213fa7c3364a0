"""Reads the results of the cells of a grid, and makes the table of all."""

import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper.grid import CONFIGS, Cell, with_settled_kind
from experiments.paper.report.statistics import error_of_mean, group
from experiments.records import Row, as_read, read_json
from skyformer_jax.attention import NAMES
from skyformer_jax.errors import UserError, one_of
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
        "variant": cell.variant,
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
    """Returns an earlier JSON's finished entries that are not of these cells; none if missing.

    Raises:
      UserError: if the file is not the JSON of a grid, or has a finished entry of a config and
        attention of the cells in another setting than theirs.
    """
    if not path.exists():
        return []
    own = {(cell.config, cell.attention, cell.seed) for cell in cells}
    settings = {
        (cell.config, cell.attention): (cell.variant, as_read(cell.departures)) for cell in cells
    }
    try:
        result = read_json(path)
        # Older files have the variant only once, because all their cells had the same.
        variant = result.get("variant", "")
        found = {
            (row["config"], row["attention"], row["seed"]): {
                "variant": variant,
                **row,
                "departures": dict(row["departures"]),
            }
            for row in result["cells"]
            if row["status"] == "finished"
        }
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a JSON file of this script; name another --out") from None
    for (config, attention, seed), row in found.items():
        one_of(f"config in {path}:", config, CONFIGS)
        one_of(f"attention in {path}:", attention, NAMES)
        setting = row["variant"], row["departures"]
        if setting != settings.get((config, attention), setting):
            raise UserError(
                f"{path} has {config} {attention}, seed {seed}, of another setting than this "
                "command's; name another --out"
            )
    return [row for key, row in found.items() if key not in own]


def _place(row: Row) -> tuple[int, int]:
    return CONFIGS.index(row["config"]), NAMES.index(row["attention"])


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sorts entries of cells by seed, config and attention, whatever order they were trained in."""
    return sorted(rows, key=lambda row: (row["seed"], *_place(row)))


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns mean and spread of the accuracy over the finished seeds, the JSON's "summary".

    The entries are in the order of configs and attentions, for those that have a row.
    """
    of_keys: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=_place):
        of_keys.setdefault((row["config"], row["attention"]), []).append(row)
    summary = []
    for (config, attention), own in of_keys.items():
        found = [row["accuracy"] for row in own if row["status"] == "finished"]
        summary.append(
            {
                "config": config,
                "attention": attention,
                "num_seeds": len(found),
                "mean": statistics.fmean(found) if found else None,
                "standard_deviation": statistics.stdev(found) if len(found) > 1 else None,
                "standard_error": error_of_mean(found),
            }
        )
    return summary


def _shared_setting(row: Row) -> str:
    """Returns what all attentions of a config must have in common to be compared, as text."""
    shared = {k: v for k, v in row["departures"].items() if not k.startswith("attention.")}
    return json.dumps([row["variant"], shared], sort_keys=True)


def table(rows: Sequence[Row]) -> str:
    """Formats test accuracy in percent, attentions by configs, and the settings, as Markdown.

    An attention without a finished cell of a config has "-" there.
    """
    of_configs, texts = group(sorted(rows, key=_place), "config"), {}
    for entry in summarise(rows):
        num_seeds = len({row["seed"] for row in of_configs[entry["config"]]})
        text = f"{100 * entry['mean']:.2f}" if entry["num_seeds"] else "-"
        if entry["num_seeds"] > 1:
            text += f" ± {100 * entry['standard_deviation']:.2f}"
        if 0 < entry["num_seeds"] < num_seeds:
            text += f" ({entry['num_seeds']} of {num_seeds})"
        texts[entry["config"], entry["attention"]] = text
    lines = ["| | " + " | ".join(of_configs) + " |", "|---" * (1 + len(of_configs)) + "|"]
    for name in group(rows, "attention"):
        of_name = [texts.get((config, name), "-") for config in of_configs]
        lines.append(f"| `{name}` | {' | '.join(of_name)} |")
    lines.append("")
    for config, own in of_configs.items():
        sizes = {f"{row['num_steps']:,} steps of {row['batch_size']}" for row in own}
        fields = sorted({field for row in own for field in row["departures"]})
        setting = f"departs from the full setting in {', '.join(fields)}" if fields else "full"
        lines.append(f"{config}: {', '.join(sorted(sizes))}; {setting}")
        if len({row["data"]["checksum"] for row in own if row["data"]}) > 1:
            lines.append(f"{config}: WARNING: its cells were evaluated on different data")
        if len({_shared_setting(row) for row in own}) > 1:
            lines.append(f"{config}: WARNING: its cells were trained in different settings")
    return "\n".join(lines)
