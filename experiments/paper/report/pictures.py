"""The pictures of results: each a function of what a JSON of results/ holds, and of a path.

The scripts of experiments/paper/ draw them as they measure, the report draws them again.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.palette import line_style
from experiments.paper import published
from experiments.paper.report.statistics import Result, Row, finished, group, measured
from skyformer_jax.attention import NAMES


def _by_task(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """{config: {attention: rows}}, the configs in the paper's order and then the others."""
    found = group(rows, "config", "attention")
    order = [c for c in published.CONFIGS if c in found]
    return {config: found[config] for config in [*order, *(c for c in found if c not in order)]}


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
    """The mean of lists of one length, element by element."""
    return [sum(column) / len(column) for column in zip(*values, strict=True)]


def stability(result: Result, path: Path) -> None:
    """Instability score of each step, a panel a task, a line an attention, mean of the seeds."""
    tasks = _by_task(measured(result))

    def draw(axis: Axes, config: str) -> None:
        for name, rows in tasks[config].items():
            scores = _mean(row["instability"] for row in rows)
            axis.plot(range(1, len(scores) + 1), scores, label=name, **line_style(name))
        axis.set(title=config, xlabel="step", yscale="log")

    figure = _panels(list(tasks), draw)
    figure.axes[0].set_ylabel("instability score")
    _save(figure, path)


def singular_values(result: Result, path: Path) -> None:
    """Singular values over the greatest, a column a task; before training above, after it below."""
    tasks = _by_task(measured(result))
    whens = {"initial": "before training", "trained": f"after {result['steps']} steps"}
    panels = {
        f"{config}, {text}": (config, when) for when, text in whens.items() for config in tasks
    }

    def draw(axis: Axes, title: str) -> None:
        config, when = panels[title]
        for name, rows in tasks[config].items():
            values = _mean(row[when] for row in rows)
            style = {**line_style(name), "marker": ""}
            axis.plot(range(1, len(values) + 1), values, label=name, **style)
        axis.set(title=title, yscale="log", ylim=(1e-4, 1.5), xlabel="index")

    figure = _panels(list(panels), draw, rows=2, height=2.6)
    for axis in figure.axes[:: len(tasks)]:
        axis.set_ylabel("singular value over the greatest")
    _save(figure, path)


def figure1(result: Result, path: Path) -> None:
    """Relative error against features, a panel for each kind of weights and length."""
    panels = {
        f"{kind}, n = {length:,}": of_name
        for kind, of_length in group(result["rows"], "weights", "length", "attention").items()
        for length, of_name in of_length.items()
    }

    def draw(axis: Axes, title: str) -> None:
        for name, rows in panels[title].items():
            features = [row["num_features"] for row in rows]
            errors = [row["relative_error"]["median"] for row in rows]
            axis.plot(features, errors, label=name, **line_style(name))
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
    tasks = _by_task(finished(result))

    def draw(axis: Axes, config: str) -> None:
        for position, name in enumerate(reversed(NAMES)):
            found = [100 * row["accuracy"] for row in tasks[config].get(name, [])]
            style = {**line_style(name), "ls": "", "ms": 5}
            axis.plot(found, [position] * len(found), alpha=0.5, **style)
            if found:
                style |= {"ms": 9, "marker": "|"}
                axis.plot([sum(found) / len(found)], [position], **style)
        _list_names(axis)
        first = next(iter(tasks[config].values()))[0]
        for floor, accuracy in first["floors"].items():
            if 100 * accuracy > axis.get_xlim()[0] - 10:
                axis.axvline(100 * accuracy, ls="--", lw=1, color="gray")
                axis.set_title(f"dashed: {floor}", fontsize=7, loc="right", color="gray")
        axis.set_title(config, loc="left")
        axis.set_xlabel("test accuracy, %")

    _save(_panels(list(tasks), draw), path)


def table2(result: Result, path: Path) -> None:
    """Seconds of a step above, memory below, over softmax's; a panel a task; the paper's hollow."""
    tasks = _by_task(measured(result))
    whats = {
        "time": ("seconds_per_step", published.HOURS),
        "memory": ("bytes", published.MEMORY),
    }
    panels = {f"{config}, {what}": (config, what) for what in whats for config in tasks}

    def draw(axis: Axes, title: str) -> None:
        config, what = panels[title]
        field, printed = whats[what]
        own = {name: rows[0][field] for name, rows in tasks[config].items()}
        for position, name in enumerate(reversed(NAMES)):
            style = {**line_style(name), "ls": "", "ms": 6}
            if name in own and "softmax" in own:
                axis.plot([own[name] / own["softmax"]], [position], **style)
            if config in printed["softmax"]:
                ratio = printed[name][config] / printed["softmax"][config]
                axis.plot([ratio], [position], **{**style, "mfc": "none"})
        _list_names(axis)
        axis.axvline(1, ls="--", lw=1, color="gray")
        axis.set(title=title, xlabel="over softmax's; hollow: paper")
        _logarithmic(axis)

    _save(_panels(list(panels), draw, rows=2), path)


def figure2(result: Result, path: Path) -> None:
    """Validation accuracy above, loss below, against time; a column a task; mean of the seeds."""
    tasks = _by_task(result["rows"])
    panels = {
        f"{config}, {what}": (config, what) for what in ("accuracy", "loss") for config in tasks
    }
    longest = max(point["seconds"] for row in result["rows"] for point in row["validation"])
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60)

    def draw(axis: Axes, title: str) -> None:
        config, what = panels[title]
        for name, rows in tasks[config].items():
            curves = [row["validation"] for row in rows]
            times = _mean([point["seconds"] / seconds for point in curve] for curve in curves)
            values = _mean([point[what] for point in curve] for curve in curves)
            axis.plot(times, values, label=name, **line_style(name))
        axis.set(title=title, xlabel=f"{unit} of training")
        _logarithmic(axis)

    figure = _panels(list(panels), draw, rows=2, height=2.7)
    for i, what in enumerate(("validation accuracy", "validation loss, nats")):
        figure.axes[i * len(tasks)].set_ylabel(what)
    _save(figure, path)
