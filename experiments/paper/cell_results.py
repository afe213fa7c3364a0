"""What the cells of a grid have come to: their results, and the table of all."""

import collections
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.paper.grid import Cell
from experiments.records import as_read, read_json
from skyformer_jax.errors import UserError
from skyformer_jax.training import checkpoints
from skyformer_jax.training import config as configs
from skyformer_jax.training.results import config_digest

TRAINABLE = ("unfinished", "failed")  # statuses; the others are finished and refused

Row = dict[str, Any]


def read_result(cell: Cell) -> dict[str, Any] | None:
    """What eval_test.json of the cell holds; None if the cell is not finished.

    Raises:
      UserError: if it is damaged, or the result of another config or of a checkpoint other than
        the best.
    """
    path = cell.workdir / "eval_test.json"
    if not path.exists():
        return None
    result = read_json(path)
    saved = configs.read(cell.workdir / "config.json")
    different = configs.differences(configs.to_dict(saved), cell.asked)
    # The digest is of what was evaluated, should config.json be of a later attempt.
    if different or result.get("config_digest") != config_digest(saved):
        raise UserError(
            f"{cell.workdir} holds the result of another config; name another --dir, or delete it: "
            + ("; ".join(different) or "eval_test.json is older than config.json")
        )
    folder = cell.workdir / "checkpoints"  # may have been deleted to save space
    if checkpoints.steps(folder) and result["checkpoint"] != checkpoints.find(folder, "best"):
        raise UserError(
            f"{path} is of checkpoint {result['checkpoint']}, not of the best; "
            f"run python eval.py --workdir={cell.workdir}"
        )
    return result


def read_cell(cell: Cell) -> Row:
    """The cell's entry in the JSON, by what lies in its folder."""
    record_path = cell.workdir / "sweep.json"
    record = read_json(record_path) if record_path.exists() else {}
    try:
        result = read_result(cell)
        error = None if result else record.get("error")
        status = "finished" if result else "failed" if error else "unfinished"
    except UserError as refusal:
        result, error, status = None, str(refusal), "refused"
    found = result or {}
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
        **{field: found.get(field) for field in fields},
        "validation_accuracy": found["validation"]["accuracy"] if found else None,
        **{field: record.get(field) for field in ("seconds", "attempts", "provenance")},
    }


def read_others(path: Path, cells: Sequence[Cell]) -> list[Row]:
    """The finished entries of an earlier JSON that are of other seeds than the cells.

    Args:
      path: of the JSON; where there is none, nothing is read.
      cells: of the setting that the entries must have.

    Raises:
      UserError: if the file is none of a grid's, or has finished entries of another setting, task
        or attention.
    """
    if not path.exists():
        return []
    try:
        rows = [row for row in read_json(path)["cells"] if row["status"] == "finished"]
        keys = [(row["config"], row["attention"], row["seed"]) for row in rows]
        found = [row["departures"] for row in rows]
    except (UserError, KeyError, TypeError):
        raise UserError(f"{path} is no JSON of this script; name another --out") from None
    own = {(cell.config, cell.attention, cell.seed) for cell in cells}
    settings = {(cell.config, cell.attention): as_read(cell.departures) for cell in cells}
    for (config, name, seed), departures in zip(keys, found, strict=True):
        if departures != settings.get((config, name)):
            raise UserError(
                f"{path} has {config} {name}, seed {seed}, of another setting than this command's, "
                "or not in its grid; name another --out"
            )
    return [row for key, row in zip(keys, rows, strict=True) if key not in own]


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and spread of the accuracy over the seeds that are finished.

    Args:
      rows: of read_cell.

    Returns:
      The "summary" of the JSON, in the order of the rows.
    """
    accuracies = collections.defaultdict(list)
    for row in rows:
        found = accuracies[row["config"], row["attention"]]
        if row["status"] == "finished":
            found.append(row["accuracy"])
    summary = []
    for (config, name), found in accuracies.items():
        deviation = statistics.stdev(found) if len(found) > 1 else None
        summary.append(
            {
                "config": config,
                "attention": name,
                "num_seeds": len(found),
                "mean": statistics.fmean(found) if found else None,
                "standard_deviation": deviation,
                "standard_error": deviation and deviation / math.sqrt(len(found)),
            }
        )
    return summary


def table(rows: Sequence[Row]) -> str:
    """Test accuracy in percent, attentions by configs, and in what setting; Markdown."""
    configs = list(dict.fromkeys(row["config"] for row in rows))
    num_seeds = len({row["seed"] for row in rows})
    texts = collections.defaultdict(dict)
    for entry in summarise(rows):
        texts[entry["attention"]][entry["config"]] = _percent(entry, num_seeds)
    lines = ["| | " + " | ".join(configs) + " |", "|---" * (1 + len(configs)) + "|"]
    lines += [
        f"| `{name}` | " + " | ".join(of_config[config] for config in configs) + " |"
        for name, of_config in texts.items()
    ]
    lines.append("")
    for config in configs:
        own = [row for row in rows if row["config"] == config]
        sizes = {f"{row['num_steps']:,} steps of {row['batch_size']}" for row in own}
        fields = sorted({field for row in own for field in row["departures"]})
        setting = f"departs from the full setting in {', '.join(fields)}" if fields else "full"
        lines.append(f"{config}: {', '.join(sorted(sizes))}; {setting}")
        if len({row["data"]["checksum"] for row in own if row["data"]}) > 1:
            lines.append(f"{config}: WARNING: its cells were evaluated on different data")
    return "\n".join(lines)


def _percent(entry: dict[str, Any], num_seeds: int) -> str:
    if not entry["num_seeds"]:
        return "-"
    text = f"{100 * entry['mean']:.2f}"
    if entry["standard_deviation"] is not None:
        text += f" ± {100 * entry['standard_deviation']:.2f}"
    return text + (
        f" ({entry['num_seeds']} of {num_seeds})" if entry["num_seeds"] < num_seeds else ""
    )
