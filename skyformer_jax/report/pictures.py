"""The pictures of results: each a function of what a JSON of results/ holds, and of a path.

The scripts of experiments/ draw them as they measure, the report draws them again.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from skyformer_jax.attention import NAMES
from skyformer_jax.report import paper

Result = dict[str, Any]
Rows = list[dict[str, Any]]

# Colours that colour-blind readers tell apart (Okabe and Ito, 2008), and black for what is exact.
_COLOURS = dict(
    zip(
        NAMES,
        ("#000000", "#999999", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7",
         "#8B6F3E"),
        strict=True,
    )
)  # fmt: skip
_MARKERS = dict(zip(NAMES, "osD^v<>Ph", strict=True))


def _style(name: str) -> dict[str, Any]:
    """How an attention's lines look in all pictures."""
    return {
        "color": _COLOURS[name],
        "marker": _MARKERS[name],
        "ms": 4,
        "lw": 2 if name == "skyformer" else 1.2,
        "zorder": 3 if name == "skyformer" else 2,
    }


def _configs(rows: Rows) -> list[str]:
    """Of the rows, in the paper's order and then the others."""
    found = list(dict.fromkeys(row["config"] for row in rows))
    return [c for c in paper.CONFIGS if c in found] + [c for c in found if c not in paper.CONFIGS]


def _names(rows: Rows) -> list[str]:
    found = {row["attention"] for row in rows}
    return [name for name in NAMES if name in found]


def _measured(result: Result) -> Rows:
    return [row for row in result["rows"] if "skipped" not in row]


def _panels(
    names: Sequence[str], draw: Callable[[Axes, str], None], *, rows: int = 1, height: float = 3.1
) -> Figure:
    """A figure with a panel for each name, and one legend below all."""
    columns = -(-len(names) // rows)
    figure = Figure(figsize=(max(3.1 * columns, 5), height * rows + 0.5), layout="constrained")
    for axis, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        draw(axis, name)
        axis.grid(alpha=0.3)
        if axis.get_xscale() == "linear":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[len(names) :]:
        axis.set_visible(False)
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 + 2 * columns),
        fontsize=8,
        frameon=False,
    )
    return figure


def _logarithmic(axis: Axes) -> None:
    """A logarithmic axis of x with ticks that read 0.2, 0.5, 1, ..."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _list_names(axis: Axes) -> None:
    """All attentions along y, the first on top."""
    axis.set_yticks(range(len(NAMES)), reversed(NAMES), fontsize=8)
    axis.set_ylim(-0.6, len(NAMES) - 0.4)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _mean(values: Iterable[Sequence[float]]) -> list[float]:
    """Of lists of one length, place by place."""
    return [sum(column) / len(column) for column in zip(*values, strict=True)]


def stability(result: Result, path: Path) -> None:
    """Instability score of each step, a panel a task, a line an attention, mean of the seeds."""
    rows = _measured(result)

    def draw(axis: Axes, config: str) -> None:
        own = [row for row in rows if row["config"] == config]
        for name in _names(own):
            scores = _mean(row["instability"] for row in own if row["attention"] == name)
            axis.plot(range(1, len(scores) + 1), scores, label=name, **_style(name))
        axis.set(title=config, xlabel="step", yscale="log")

    figure = _panels(_configs(rows), draw)
    figure.axes[0].set_ylabel("instability score")
    _save(figure, path)


def singular_values(result: Result, path: Path) -> None:
    """Singular values over the greatest, a column a task; before training above, after it below."""
    rows = _measured(result)
    configs = _configs(rows)
    whens = {
        "initial": "before training",
        "trained": f"after {result['steps']} steps",
    }
    panels = {
        f"{config}, {text}": (config, when) for when, text in whens.items() for config in configs
    }

    def draw(axis: Axes, title: str) -> None:
        config, when = panels[title]
        own = [row for row in rows if row["config"] == config]
        for name in _names(own):
            values = _mean(row[when] for row in own if row["attention"] == name)
            axis.plot(
                range(1, len(values) + 1), values, label=name, **{**_style(name), "marker": ""}
            )
        axis.set(title=title, yscale="log", ylim=(1e-4, 1.5), xlabel="index")

    figure = _panels(list(panels), draw, rows=2, height=2.6)
    for axis in figure.axes[:: len(configs)]:
        axis.set_ylabel("singular value over the greatest")
    _save(figure, path)


def figure1(result: Result, path: Path) -> None:
    """Relative error against features, a panel for each kind of weights and length."""
    found = dict.fromkeys((row["weights"], row["length"]) for row in result["rows"])
    panels = {f"{kind}, n = {length:,}": (kind, length) for kind, length in found}

    def draw(axis: Axes, title: str) -> None:
        own = [row for row in result["rows"] if (row["weights"], row["length"]) == panels[title]]
        for name in _names(own):
            points = [
                (row["num_features"], row["relative_error"]["median"])
                for row in own
                if row["attention"] == name
            ]
            axis.plot(*zip(*points, strict=True), label=name, **_style(name))
        # What is exact is below the axis.
        axis.set(title=title, xlabel="features", xscale="log", yscale="log", ylim=(3e-4, 3))
        axis.set_xticks(result["features"], result["features"], minor=False)
        axis.minorticks_off()

    rows = -(-len(panels) // 4)
    figure = _panels(list(panels), draw, rows=rows, height=2.7)
    for axis in figure.axes[:: -(-len(panels) // rows)]:
        axis.set_ylabel("relative spectral error")
    _save(figure, path)


def table1(result: Result, path: Path) -> None:
    """Test accuracy, a panel a task: every seed, the mean, and the floors as dashed lines."""
    rows = [row for row in result["cells"] if row["status"] == "finished"]

    def draw(axis: Axes, config: str) -> None:
        own = [row for row in rows if row["config"] == config]
        for place, name in enumerate(reversed(NAMES)):
            found = [100 * row["accuracy"] for row in own if row["attention"] == name]
            style = {**_style(name), "ls": "", "ms": 5}
            axis.plot(found, [place] * len(found), alpha=0.5, **style)
            if found:
                axis.plot([sum(found) / len(found)], [place], **{**style, "ms": 9, "marker": "|"})
        _list_names(axis)
        for floor, accuracy in (own[0]["floors"] if own else {}).items():
            if 100 * accuracy > axis.get_xlim()[0] - 10:
                axis.axvline(100 * accuracy, ls="--", lw=1, color="gray")
                axis.set_title(f"dashed: {floor}", fontsize=7, loc="right", color="gray")
        axis.set_title(config, loc="left")
        axis.set_xlabel("test accuracy, %")

    _save(_panels(_configs(rows), draw), path)


def table2(result: Result, path: Path) -> None:
    """Seconds of a step above, memory below, over softmax's; a panel a task; the paper's hollow."""
    rows = _measured(result)
    configs = _configs(rows)
    whats = {"time": ("seconds_per_step", paper.HOURS), "memory": ("bytes", paper.MEMORY)}
    panels = {f"{config}, {what}": (config, what) for what in whats for config in configs}

    def draw(axis: Axes, title: str) -> None:
        config, what = panels[title]
        field, printed = whats[what]
        own = {row["attention"]: row[field] for row in rows if row["config"] == config}
        for place, name in enumerate(reversed(NAMES)):
            style = {**_style(name), "ls": "", "ms": 6}
            if name in own and "softmax" in own:
                axis.plot([own[name] / own["softmax"]], [place], **style)
            if config in printed["softmax"]:
                ratio = printed[name][config] / printed["softmax"][config]
                axis.plot([ratio], [place], **{**style, "mfc": "none"})
        _list_names(axis)
        axis.axvline(1, ls="--", lw=1, color="gray")
        axis.set(title=title, xlabel="over softmax's; hollow: paper")
        _logarithmic(axis)

    _save(_panels(list(panels), draw, rows=2), path)


def figure2(result: Result, path: Path) -> None:
    """Validation accuracy above, loss below, against time; a column a task; mean of the seeds."""
    rows = result["rows"]
    configs = _configs(rows)
    panels = {
        f"{config}, {what}": (config, what) for what in ("accuracy", "loss") for config in configs
    }
    unit, seconds = ("hours", 3600) if _longest(rows) > 7200 else ("minutes", 60)

    def draw(axis: Axes, title: str) -> None:
        config, what = panels[title]
        own = [row for row in rows if row["config"] == config]
        for name in _names(own):
            curves = [row["validation"] for row in own if row["attention"] == name]
            times = _mean([point["seconds"] / seconds for point in curve] for curve in curves)
            values = _mean([point[what] for point in curve] for curve in curves)
            axis.plot(times, values, label=name, **_style(name))
        axis.set(title=title, xlabel=f"{unit} of training")
        _logarithmic(axis)

    figure = _panels(list(panels), draw, rows=2, height=2.7)
    for i, what in enumerate(("validation accuracy", "validation loss, nats")):
        figure.axes[i * len(configs)].set_ylabel(what)
    _save(figure, path)


def _longest(rows: Rows) -> float:
    return max(point["seconds"] for row in rows for point in row["validation"])
