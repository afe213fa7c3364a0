"""Draws the pictures of results; each function takes the content of a JSON and a path.

The scripts of experiments/paper/ draw them while they measure, and the report draws them again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.palette import line_style
from experiments.paper import published
from experiments.paper.report import statistics
from experiments.paper.report.statistics import Result, finished, group, measured
from skyformer_jax.attention import NAMES


def _in_order(of_config: Mapping[str, Any]) -> dict[str, Any]:
    """Sorts configs into the paper's order, followed by the others."""
    order = dict.fromkeys([*published.CONFIGS, *of_config])
    return {config: of_config[config] for config in order if config in of_config}


def _save(
    path: Path,
    panels: Mapping[str, Any],
    draw: Callable[[Axes, Any], None],
    *,
    labels: Sequence[str] = ("",),
    height: float = 3.1,
) -> None:
    """Saves a figure of panels with one legend below.

    `panels` is {title: second argument of `draw`}, whose first argument is the axes. Each label of
    the y axis has a row of panels, `height` inches high.
    """
    columns, rows = -(-len(panels) // len(labels)), len(labels)
    figure = Figure(figsize=(max(3.1 * columns, 5), height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    handles = {}
    for axis, (title, content) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, content)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.get_xscale() == "linear":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    for axis in figure.axes[len(panels) :]:
        axis.set_visible(False)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 + 2 * columns),
        fontsize=8,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _logarithmic(axis: Axes) -> None:
    """Makes the x axis logarithmic, with ticks at 0.2, 0.5, 1, ..."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _list_names(axis: Axes) -> None:
    """Lists all attentions along the y axis, the first on top."""
    axis.set_yticks(range(len(NAMES)), reversed(NAMES), fontsize=8)
    axis.set_ylim(-0.6, len(NAMES) - 0.4)


def _plot_mean(axis: Axes, name: str, values: Iterable[Sequence[float]], **style: Any) -> None:
    """Plots the line of an attention: the mean of lists of values against 1, 2, 3, ..."""
    mean = np.mean(list(values), axis=0)
    axis.plot(range(1, len(mean) + 1), mean, label=name, **line_style(name) | style)


def stability(result: Result, path: Path) -> None:
    """Draws mean instability over the seeds by step: a panel per task, a line per attention."""

    def draw(axis: Axes, of_name: dict[str, Any]) -> None:
        for name, rows in of_name.items():
            _plot_mean(axis, name, (row["instability"] for row in rows))
        axis.set(xlabel="step", yscale="log")

    tasks = _in_order(group(measured(result), "config", "attention"))
    _save(path, tasks, draw, labels=["instability score"])


def singular_values(result: Result, path: Path) -> None:
    """Draws singular values over the greatest, by task; before training above, after it below."""

    def draw(axis: Axes, content: tuple[dict[str, Any], str]) -> None:
        of_name, when = content
        for name, rows in of_name.items():
            _plot_mean(axis, name, (row[when] for row in rows), marker="")
        axis.set(yscale="log", ylim=(1e-4, 1.5), xlabel="index")

    tasks = _in_order(group(measured(result), "config", "attention"))
    whens = {"initial": "before training", "trained": f"after {result['steps']} steps"}
    panels = {
        f"{config}, {text}": (of_name, when)
        for when, text in whens.items()
        for config, of_name in tasks.items()
    }
    _save(path, panels, draw, labels=["singular value over the greatest"] * 2, height=2.6)


def figure1(result: Result, path: Path) -> None:
    """Draws relative error against features, a panel per kind of weights and length."""

    def draw(axis: Axes, of_name: dict[str, dict[int, float]]) -> None:
        for name, errors in of_name.items():
            axis.plot(errors.keys(), errors.values(), label=name, **line_style(name))
        # Exact approximations lie below the axis.
        axis.set(xlabel="features", xscale="log", yscale="log", ylim=(3e-4, 3))
        axis.set_xticks(result["features"], result["features"], minor=False)
        axis.minorticks_off()

    panels = {
        f"{kind}, n = {length:,}": of_name
        for (kind, length), of_name in statistics.spectral_errors(result).items()
    }
    labels = ["relative spectral error"] * -(-len(panels) // 4)
    _save(path, panels, draw, labels=labels, height=2.7)


def table1(result: Result, path: Path) -> None:
    """Draws test accuracy by task: every seed, the mean, the paper's, and the highest floor."""

    def draw(axis: Axes, content: tuple[str, dict[str, Any]]) -> None:
        config, of_name = content
        for position, name in enumerate(reversed(NAMES)):
            found = [100 * row["accuracy"] for row in of_name.get(name, [])]
            style = {**line_style(name), "ls": "", "ms": 5}
            if config in published.ACCURACY[name]:
                printed = [published.ACCURACY[name][config]]
                axis.plot(printed, [position], **{**style, "mfc": "none"})
            axis.plot(found, [position] * len(found), alpha=0.5, **style)
            if found:
                style |= {"ms": 9, "marker": "|"}
                axis.plot([np.mean(found)], [position], **style)
        _list_names(axis)
        floors, label = next(iter(of_name.values()))[0]["floors"], "hollow: paper"
        highest = max(floors, key=floors.get)
        if 100 * floors[highest] > axis.get_xlim()[0] - 10:
            axis.axvline(100 * floors[highest], ls="--", lw=1, color="gray")
            label += f"; dashed: {highest}"
        axis.set_xlabel(f"test accuracy, %\n{label}", fontsize=8)

    tasks = _in_order(group(finished(result), "config", "attention"))
    _save(path, {config: (config, of_name) for config, of_name in tasks.items()}, draw)


def table2(result: Result, path: Path) -> None:
    """Draws time (above) and memory (below) of a step over softmax's; the paper's are hollow."""

    def draw(axis: Axes, content: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
        config, ours, printed = content
        for position, name in enumerate(reversed(NAMES)):
            style = {**line_style(name), "ls": "", "ms": 6}
            if name in ours:
                axis.plot([ours[name].value], [position], **style)
            if config in printed["softmax"]:
                ratio = printed[name][config] / printed["softmax"][config]
                axis.plot([ratio], [position], **{**style, "mfc": "none"})
        _list_names(axis)
        axis.axvline(1, ls="--", lw=1, color="gray")
        axis.set(xlabel="over softmax's; hollow: paper")
        _logarithmic(axis)

    whats = (("time", "seconds_per_step", published.HOURS), ("memory", "bytes", published.MEMORY))
    panels = {
        f"{config}, {what}": (
            config,
            statistics.cost_ratios(result, field).get(config, {}),
            printed,
        )
        for what, field, printed in whats
        for config in _in_order(group(measured(result), "config"))
    }
    _save(path, panels, draw, labels=["", ""])


def figure2(result: Result, path: Path) -> None:
    """Draws mean validation accuracy (above) and loss (below) against time, a column per task."""
    tasks = _in_order(statistics.mean_curves(result))
    longest = max(point["seconds"] for row in result["rows"] for point in row["validation"])
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60)

    def draw(axis: Axes, content: tuple[dict[str, Any], int]) -> None:
        curves, column = content
        for name, points in curves.items():
            times = [point[0] / seconds for point in points]
            values = [point[column] for point in points]
            axis.plot(times, values, label=name, **line_style(name))
        axis.set_xlabel(f"{unit} of training")
        _logarithmic(axis)

    panels = {
        f"{config}, {what}": (curves, column)
        for column, what in enumerate(("accuracy", "loss"), start=1)
        for config, curves in tasks.items()
    }
    labels = ["validation accuracy", "validation loss, nats"]
    _save(path, panels, draw, labels=labels, height=2.7)
