"""The cells of a grid of task x attention x seed: their configs, their results, their table."""

import collections
import dataclasses
import importlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import skyformer_jax.config
from skyformer_jax import attention, cli
from skyformer_jax.config import one_of
from skyformer_jax.errors import UserError
from skyformer_jax.training import checkpoints
from skyformer_jax.training.evaluation import config_digest

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = tuple(sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem != "common"))
# What a config that is reduced by itself is a reduction of.
_FULL = {"quickstart": "listops"}
# How fields begin that do not change what is computed, or are none of the setting.
NOT_SETTING = (*skyformer_jax.config.MEANS, "data.source", "seed")
TRAINABLE = ("unfinished", "failed")  # statuses; the others are finished and refused


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of the grid.

    Attributes:
      config: name of a file in configs/.
      attention: name of the attention.
      seed: of the run.
      workdir: its folder.
      arguments: what train.py is told beside the workdir.
      asked: what config.json of the run has to say.
      departures: {field: (full setting, here)} for all that is not as in the full setting.
    """

    config: str
    attention: str
    seed: int
    workdir: Path
    arguments: tuple[str, ...]
    asked: dict[str, Any]
    departures: dict[str, tuple[Any, Any]]


def make_grid(
    configs: Sequence[str],
    attentions: Sequence[str],
    seeds: Sequence[str],
    variant: str,
    overrides: Sequence[str],
    directory: Path,
) -> list[Cell]:
    """All cells, seed by seed, so that the first seed's table is whole first.

    Args:
      configs: names of files in configs/.
      attentions: names of attentions.
      seeds: numbers, as text.
      variant: of the configs, or "".
      overrides: each [CONFIG:]FIELD=VALUE.
      directory: of the cells' folders.

    Raises:
      UserError: for the first thing that cannot work, before anything is started.
    """
    configs, attentions = list(dict.fromkeys(configs)), list(dict.fromkeys(attentions))
    for name in configs:
        one_of("config", name, CONFIGS)
    for name in attentions:
        one_of("attention", name, attention.NAMES)
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds has {seed!r}, which is not a whole number from 0")
    for what, values in (("configs", configs), ("attentions", attentions), ("seeds", seeds)):
        if not values:
            raise UserError(f"--{what} is empty; name at least one, or leave the flag out")
    settings = [_parse_override(text, configs) for text in overrides]
    return [
        _make_cell(
            config,
            name,
            seed,
            variant,
            [setting for owner, setting in settings if owner in ("", config)],
            directory,
        )
        for seed in dict.fromkeys(int(seed) for seed in seeds)
        for config in configs
        for name in attentions
    ]


def _parse_override(text: str, configs: Sequence[str]) -> tuple[str, str]:
    """[CONFIG:]FIELD=VALUE as config, "" for all, and FIELD=VALUE."""
    field, equals, value = text.partition("=")
    owner, _, field = field.rpartition(":")
    if not (field and equals):
        raise UserError(f"--set={text} is not [CONFIG:]FIELD=VALUE, as in train.num_steps=100")
    return one_of("config in --set:", owner, configs) if owner else "", f"{field}={value}"


def _make_cell(
    config_name: str,
    attention_name: str,
    seed: int,
    variant: str,
    settings: Sequence[str],
    directory: Path,
) -> Cell:
    name = f"{attention_name},{variant}" if variant else attention_name
    arguments = (
        f"--config={ROOT / 'configs' / config_name}.py:{name}",
        *(f"--config.{setting}" for setting in settings),
        f"--config.seed={seed}",
    )
    config = parse_config(arguments)
    if (config.attention.name, config.seed, config.num_seeds) != (attention_name, seed, 1):
        raise UserError("--set cannot set attention.name, seed or num_seeds: each cell has its own")
    skyformer_jax.config.check(config, num_devices=1)
    get_full = importlib.import_module(f"configs.{_FULL.get(config_name, config_name)}").get_config
    full = get_full(name if variant == "paper" else attention_name)
    asked = skyformer_jax.config.stored(config)
    folder = "-".join(filter(None, (config_name, attention_name, variant, f"seed{seed}")))
    return Cell(
        config=config_name,
        attention=attention_name,
        seed=seed,
        workdir=directory / folder,
        arguments=arguments,
        asked=asked,
        departures=_departures(skyformer_jax.config.to_dict(full), asked),
    )


def parse_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The config that train.py makes of these arguments."""
    values, argv = flags.FlagValues(), ["train.py", *arguments]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    cli.parse(values, argv)
    return config.value


def _departures(full: dict[str, Any], asked: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    full, asked = skyformer_jax.config.flatten(full), skyformer_jax.config.flatten(asked)
    return {
        field: (full.get(field), asked.get(field))
        for field in sorted(full.keys() | asked.keys())
        if not field.startswith(NOT_SETTING) and full.get(field) != asked.get(field)
    }


def read_result(cell: Cell) -> dict[str, Any] | None:
    """What eval_test.json of the cell holds; None if the cell is not finished.

    Raises:
      UserError: if it is damaged, or the result of another config or of a checkpoint other than
        the best.
    """
    path = cell.workdir / "eval_test.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    saved = skyformer_jax.config.read(cell.workdir / "config.json")
    different = skyformer_jax.config.differences(skyformer_jax.config.to_dict(saved), cell.asked)
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


def read_cell(cell: Cell) -> dict[str, Any]:
    """The cell's entry in the JSON, by what lies in its folder."""
    record_path = cell.workdir / "sweep.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
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


def read_others(path: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
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
        rows = [row for row in json.loads(path.read_text())["cells"] if row["status"] == "finished"]
        keys = [(row["config"], row["attention"], row["seed"]) for row in rows]
        found = [row["departures"] for row in rows]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no JSON of this script; name another --out") from None
    own = {(cell.config, cell.attention, cell.seed) for cell in cells}
    settings = {
        (cell.config, cell.attention): json.loads(json.dumps(cell.departures)) for cell in cells
    }
    for (config, name, seed), departures in zip(keys, found, strict=True):
        if departures != settings.get((config, name)):
            raise UserError(
                f"{path} has {config} {name}, seed {seed}, of another setting than this command's, "
                "or not in its grid; name another --out"
            )
    return [row for key, row in zip(keys, rows, strict=True) if key not in own]


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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
        spread = statistics.stdev(found) if len(found) > 1 else None
        summary.append(
            {
                "config": config,
                "attention": name,
                "num_seeds": len(found),
                "mean": statistics.fmean(found) if found else None,
                "standard_deviation": spread,
                "standard_error": None if spread is None else spread / math.sqrt(len(found)),
            }
        )
    return summary


def table(rows: Sequence[dict[str, Any]]) -> str:
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
