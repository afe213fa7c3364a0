r"""Tabulates the runs tried for the recipes of the variants "fast": what each reached, and when.

    python -m experiments.paper.recipes --runs='runs/recipes/*'

Reads workdirs of train.py, finished or not, and writes a row for each: how its setting departs from
the paper's; the validation accuracies, with the seconds of the steps up to each; the test accuracy,
if it was evaluated; and the seconds until the validation accuracy reached the test accuracy printed
in the paper. A run of several seeds has a row for each. Rows of other workdirs in --out are kept.
Also draws the curves.
"""

import glob
import importlib
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from experiments.palette import line_style
from experiments.paper import published
from experiments.paper.grid import departures, setting_of, with_settled_kind
from experiments.records import (
    Row,
    provenance,
    provenance_of_run,
    read_json,
    replacing,
    write_json,
)
from skyformer_jax import cli
from skyformer_jax.errors import UserError
from skyformer_jax.training import config as configs
from skyformer_jax.training.logs import read_metrics, training_seconds
from skyformer_jax.training.workdir import seed_runs

_RUNS = flags.DEFINE_string("runs", None, "Glob pattern of the workdirs.", required=True)
_OUT = flags.DEFINE_string(
    "out", "results/recipes.json", "JSON to write; the picture gets the suffix .png."
)


def row_of(workdir: Path) -> Row:
    """Returns the row of a run: its setting, and what it reached.

    Raises:
      UserError: if the folder is not a workdir.
    """
    config, name = configs.read(workdir / "config.json"), workdir.name
    train = config.train
    entries = read_metrics(workdir / "metrics.jsonl")
    curve = [
        (
            entry["step"],
            round(training_seconds(entries[:i], train.batch_size), 1),
            entry["accuracy"],
        )
        for i, entry in enumerate(entries)
        if entry["split"] == "validation"
    ]
    paper = published.ACCURACY[config.attention.name].get(config.task)
    reached = [seconds for _, seconds, accuracy in curve if paper and 100 * accuracy >= paper]
    tested = workdir / "eval_test.json"
    return {
        "run": f"{workdir.parent.name}/{name}" if name.startswith("seed-") else name,
        "config": config.task,
        "attention": config.attention.name,
        "seed": config.seed,
        "departures": _departures(config),
        "num_steps": train.num_steps,
        "batch_size": train.batch_size,
        "curve": curve,
        "best_validation": max((accuracy for *_, accuracy in curve), default=None),
        "test": read_json(tested)["accuracy"] if tested.exists() else None,
        "paper": paper,
        "paper_hours": published.HOURS[config.attention.name].get(config.task),
        "seconds_to_paper": reached[0] if reached else None,
        "provenance": provenance_of_run(workdir),
    }


def _departures(config: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (paper's setting, here)} for the fields that differ."""
    get_config = importlib.import_module(f"configs.{config.task}").get_config
    full = with_settled_kind(configs.to_dict(get_config(config.attention.name)), config)
    return departures(setting_of(full), setting_of(configs.to_dict(config)))


def plot(rows: list[Row], path: Path) -> None:
    """Plots the validation curves against the minutes of the steps, a panel per task."""
    from matplotlib.figure import Figure  # imported late: it is slow to load

    names = list(dict.fromkeys(row["config"] for row in rows))
    figure = Figure(figsize=(9, 3.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        of_task = [row for row in rows if row["config"] == name and row["curve"]]
        runs: dict[str, list[Row]] = {}  # of several seeds, which share a line style
        for row in of_task:
            runs.setdefault(row["run"].partition("/seed-")[0], []).append(row)
        attentions = list(dict.fromkeys(row["attention"] for row in of_task))
        for i, (run, of_run) in enumerate(runs.items()):
            style: dict[str, Any] = line_style(of_run[0]["attention"])
            if len(runs) > len(attentions):  # other recipes of one attention
                style = {"color": f"C{i % 10}", "marker": ".x"[i // 10 % 2]}  # ten colours
            for row in of_run:
                _, seconds, accuracies = zip(*row["curve"], strict=True)
                minutes, percents = [s / 60 for s in seconds], [100 * a for a in accuracies]
                label = run.removeprefix(f"{name}-") if row is of_run[0] else None
                axis.plot(minutes, percents, **style, label=label)
        for attention in attentions:
            label = "dashed: the paper's test accuracy" if attention == attentions[0] else None
            paper, color = published.ACCURACY[attention][name], line_style(attention)["color"]
            axis.axhline(paper, ls="--", lw=1, color=color, label=label)
        axis.set(xlabel="minutes of training", ylabel="validation accuracy, %", title=name)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))  # many names
        axis.grid(alpha=0.3)
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")


def main() -> None:
    """Writes the JSON and the picture, and prints a line for each run."""
    workdirs = [Path(name) for name in sorted(glob.glob(_RUNS.value))]
    workdirs = [
        one.workdir
        for workdir in workdirs
        if (workdir / "config.json").exists()
        for one in seed_runs(configs.read(workdir / "config.json"), workdir)
    ]
    if not workdirs:
        raise UserError(f"--runs={_RUNS.value} matches no workdir of train.py")
    out = Path(_OUT.value)
    earlier = read_json(out)["rows"] if out.exists() else []
    rows = [row_of(workdir) for workdir in workdirs]
    names = {row["run"] for row in rows}
    rows = [row for row in earlier if row["run"] not in names] + rows
    what = "runs of full-length tasks by other recipes than the paper's; seconds are of the steps"
    write_json(out, {"what": what, **provenance(jax.device_count()), "rows": rows})
    plot(rows, out.with_suffix(".png"))
    for row in rows:
        best, test = (
            f"{100 * x:.2f} %" if x else "-" for x in (row["best_validation"], row["test"])
        )
        print(f"{row['run']:40} validation {best:>8} test {test:>8} (paper {row['paper']})")


if __name__ == "__main__":
    cli.run(main)
