"""Makes the sections of the report, in Markdown, each from the JSON of one experiment."""

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.paper import published
from experiments.paper.report import statistics
from experiments.paper.report.statistics import Estimate, Result, finished, group, measured
from skyformer_jax.attention import NAMES


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _runs(result: Result) -> list[dict[str, Any]]:
    """Provenance of each finished run, or of the whole result if the runs have none."""
    cells = [cell for cell in result.get("cells", []) if cell.get("status") == "finished"]
    return [cell["provenance"] for cell in cells if cell.get("provenance")] or [result]


def origin(result: Result) -> str:
    """Returns the code and hardware of a result, a sentence for each machine of its runs."""
    commits: dict[str, set[str]] = {}
    for run in _runs(result):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        machine = f"{run['device']} ({run['cores']} cores); {versions}"
        commits.setdefault(machine, set()).add(run["commit"])
    return " ".join(f"Commit {', '.join(sorted(of))}; {on}." for on, of in commits.items())


def _value(x: Any) -> str:
    return "none" if x is None else f"{x:,}" if type(x) is int else str(x)


def _departures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lists the fields in which a task's rows depart from the setting of their variant."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for field, (full, here) in row["departures"].items():
            found.setdefault(field, set()).add(f"{_value(full)} → {_value(here)}")
    return [f"`{field}` {', '.join(sorted(how))}" for field, how in sorted(found.items())]


def _reduced(rows: Sequence[dict[str, Any]], num_seeds: int = published.SEEDS) -> str:
    """Says how the settings of a task's rows depart from the full one."""
    parts = _departures(rows)
    if num_seeds < published.SEEDS:
        parts.append(f"seeds {published.SEEDS} → {num_seeds}")
    return f"Reduced: {'; '.join(parts)}." if parts else "The full setting."


def _setting(cells: Sequence[dict[str, Any]], num_seeds: int) -> str:
    """Says how the cells of a task were trained, compared with the paper."""
    if cells[0].get("variant") != "fast":
        return _reduced(cells, num_seeds)
    sizes = {f"{cell['num_steps']:,} steps of {cell['batch_size']}" for cell in cells}
    size = f"{', '.join(sorted(sizes))} instead of {published.STEPS:,} steps"
    what = "; ".join([size, *_departures(cells)])
    return f"Variant fast, which `configs/{cells[0]['config']}.py` describes: {what}."


def _compared(ours: Estimate | None, printed: float | None) -> list[str]:
    """Table cells: the paper's figure, ours, the difference and its standard error."""

    def number(x: float | None, sign: str = "") -> str:
        return "-" if x is None else f"{x:{sign}.2f}"

    if ours is None:
        return [number(printed), "-", "-", "-"]
    difference = None if printed is None else ours.value - printed
    return [number(printed), number(ours.value), number(difference, "+"), number(ours.error)]


def summary(result: Result) -> str:
    """Makes the table of accuracies: ours, its standard error, and the paper's in brackets.

    Attentions and tasks without a finished run are left out. The README shows the table of
    results/fast.json, docs/reproduction.md that one and the table of results/table1.json.
    """
    accuracies = statistics.accuracies(result)
    configs = [config for config in published.CONFIGS if config in accuracies]

    def text(name: str, config: str) -> str:
        found = accuracies[config].get(name)
        ours = "-" if found is None else f"{found.value:.1f} ± {found.error:.1f}"
        return f"{ours} ({published.ACCURACY[name][config]:.1f})"

    names = [name for name in NAMES if any(name in accuracies[config] for config in configs)]
    rows = [[f"`{name}`", *(text(name, config) for config in configs)] for name in names]
    return markdown(["", *configs], rows)


def table1(result: Result) -> str:
    """Makes a section on accuracy: one table of all tasks, then a table per task."""
    accuracies = statistics.accuracies(result)
    parts = [
        "Ours ± its standard error, and the paper's in brackets. How our runs depart from the "
        "paper's setting is said below for each task.",
        summary(result),
        "Test accuracy in percent of the best checkpoint by validation accuracy. The standard "
        "error is ours only, because the paper prints none. It comes from the spread between "
        "seeds, pooled over the attentions of a task, or, with one seed, from the size of the test "
        "set.",
    ]
    of_tasks, every_cell = group(finished(result), "config"), group(result["cells"], "config")
    for config in dict.fromkeys([*published.CONFIGS, *of_tasks]):
        if config not in of_tasks:
            errors = {cell["error"] for cell in every_cell.get(config, []) if cell["error"]}
            parts.append(f"### {config}\n\nNot yet run. {' '.join(sorted(errors))}".rstrip())
            continue
        own, cells = accuracies[config], of_tasks[config]
        rows = [
            [
                f"`{name}`",
                *_compared(own.get(name), published.ACCURACY[name].get(config)),
                str(own[name].count) if name in own else "0",
            ]
            for name in NAMES
        ]
        table = markdown(["", "paper", "ours", "difference", "standard error", "seeds"], rows)
        floors = ", ".join(f"{name} {100 * x:.1f} %" for name, x in cells[0]["floors"].items())
        data = ", ".join(sorted({cell["data"]["checksum"] for cell in cells}))
        about = (
            f"Trivial classifiers: {floors}. {cells[0]['examples']:,} test examples of "
            f"{cells[0]['task']} (data {data})."
        )
        setting = _setting(cells, min(estimate.count for estimate in own.values()))
        parts.append(f"### {config}\n\n{setting} {about}\n\n{table}")
    return "\n\n".join(parts)


def table2(result: Result) -> str:
    """Makes the section on time and memory of a step, with a table per task."""
    parts = [
        "A training step of the full model on random tokens at full length; the attentions of a "
        "task take turns in one process. Ratios to softmax, ours beside the paper's; the standard "
        "error is that of the turns' ratios. Memory is what the compiled step says it needs.",
    ]
    times, memories = (statistics.cost_ratios(result, x) for x in ("seconds_per_step", "bytes"))
    of_tasks = group(result["rows"], "config", "attention")
    for config in [config for config in published.CONFIGS if config in times]:
        own, rows = of_tasks[config], []
        for name in NAMES:
            hours, memory = (
                printed[name][config] / printed["softmax"][config]
                for printed in (published.HOURS, published.MEMORY)
            )
            cost, time = ["-", "-"], times[config].get(name)
            if time:
                row = own[name][0]
                cost = [f"{row['seconds_per_step']:.4g}", f"{row['bytes'] / 2**20:,.0f}"]
            of_memory = _compared(memories[config].get(name), memory)[:2]
            rows.append([f"`{name}`", *cost, *_compared(time, hours), *of_memory])
        of_time = ("time: paper", "ours", "difference", "error")
        table = markdown(["", "s per step", "MiB", *of_time, "memory: paper", "ours"], rows)
        some, reduced = next(iter(own.values()))[0], []
        if result["variant"] == "small":
            reduced.append("variant small of the configs")
        if some["batch_size"] != some["full_batch_size"]:
            reduced.append(f"batch {some['full_batch_size']} → {some['batch_size']}")
        setting = "The full setting."
        if reduced:
            setting = f"Reduced: {', '.join(reduced)}, on other hardware than the paper's V100."
        parts.append(f"### {config}\n\n{setting} Length {some['length']:,}.\n\n{table}")
    return "\n\n".join(parts)


def figure1(result: Result) -> str:
    """Makes the section on error by features, with a table per kind of weights and length."""
    training = result["training"]
    parts = [
        "Median, over examples, layers, heads and draws, of the spectral norm of an output's "
        "error, relative to that of the exact output. The paper shows a figure without numbers. "
        f"The trained weights are those of softmax on Text after {training['steps']:,} steps of "
        f"{training['batch_size']} (test accuracy {100 * training['accuracy']:.1f} %). "
        + _reduced([training]).replace("`", "")
    ]
    features = result["features"]
    for (weights, length), of_name in statistics.spectral_errors(result).items():
        rows = [
            [f"`{name}`", *(f"{errors[d]:.3g}" if d in errors else "-" for d in features)]
            for name, errors in of_name.items()
        ]
        parts.append(markdown([f"{weights}, n = {length:,}", *map(str, features)], rows))
    return "\n\n".join(parts)


def figure2(result: Result) -> str:
    """Makes the section on the best validation accuracy and its time, with a table per task."""
    parts = [
        "Training time is steps times the seconds of a step, measured side by side in one "
        "process; means over the seeds. The paper shows curves.",
    ]
    of_tasks = group(result["rows"], "config")
    for config, of_config in statistics.mean_curves(result).items():
        rows = []
        for name, curve in of_config.items():
            time, accuracy, loss = max(curve, key=lambda point: point[1])
            texts = (f"{100 * accuracy:.2f}", f"{loss:.4f}", f"{time:,.0f}", f"{curve[-1][0]:,.0f}")
            rows.append([f"`{name}`", *texts])
        columns = ["", "best accuracy, %", "loss at that point", "reached after, s", "total, s"]
        table = markdown(columns, rows)
        reduced = _reduced(of_tasks[config], len({row["seed"] for row in of_tasks[config]}))
        parts.append(f"### {config}\n\n{reduced}\n\n{table}")
    return "\n\n".join(parts)


def _notes(result: Result, *texts: str) -> str:
    """Joins the texts, and says which tasks were skipped."""
    reasons = {row["config"]: row["skipped"] for row in result["rows"] if "skipped" in row}
    skipped = [f"{config}: not yet run ({reason})." for config, reason in reasons.items()]
    return " ".join([*texts, *skipped])


def stability(result: Result) -> str:
    """Makes the section on instability ratios, with a row per task and attention."""
    ratios = statistics.instability_ratios(result)
    noisy = statistics.instability_ratios(result, "instability_with_noise")
    rows = []
    for config in [config for config in published.CONFIGS if config in ratios]:
        for name, ratio in ratios[config].items():
            printed = published.INSTABILITY.get(name, {}).get(config)
            figures = _compared(ratio, printed) + _compared(noisy[config][name], printed)[1:]
            rows.append([config, f"`{name}`", *figures, str(ratio.count)])
    of_error = ("difference", "standard error")
    columns = ["", "", "paper", "ours", *of_error, "with noise", *of_error, "seeds"]
    notes = [
        f"Mean instability score over the first {result['steps']} steps, as a ratio to softmax's. "
        "The standard error is from the spread between seeds; with one seed, from that of the "
        "ratio from step to step.",
        _reduced(measured(result)),
    ]
    factors = sorted(statistics.noise_of_softmax(result).values())
    if factors:
        notes.append(
            "With noise: f with dropout and landmarks as in training, drawn anew before and after "
            f"the step. Softmax's score is then {factors[0]:,.0f} to {factors[-1]:,.0f} times as "
            "large, so most of it is this noise; the paper does not say whether its f used dropout."
        )
    if result["examples"]:
        notes.append(f"f is evaluated on the first {result['examples']} examples of each batch.")
    return f"{_notes(result, *notes)}\n\n{markdown(columns, rows)}"


def singular_values(result: Result) -> str:
    """Makes the section on spectra: counts of values above a tenth and a hundredth, by cell."""
    levels = [(when, level) for when in ("initial", "trained") for level in (0.1, 0.01)]
    rows = []
    for row in measured(result):
        counts = [str(sum(value >= level for value in row[when])) for when, level in levels]
        rows.append([row["config"], f"`{row['attention']}`", str(row["seed"]), *counts])
    table = markdown(["", "", "seed", "before: > 0.1", "> 0.01", "after: > 0.1", "> 0.01"], rows)
    notes = _notes(
        result,
        "How many singular values of the second attention layer's output are above a tenth and a "
        f"hundredth of the greatest, before training and after {result['steps']} steps, counted in "
        f"the mean spectrum of {result['examples']} validation examples. The paper shows a figure.",
        _reduced(measured(result)),
    )
    return f"{notes}\n\n{table}"


def everything(results: dict[str, Result]) -> str:
    """Makes the table of all results, including those without a section."""
    fields = ("commit", "device")
    rows = [
        [
            f"[{name}]({name}.json)",
            result.get("what", ""),
            *(", ".join(sorted({run.get(x, "") for run in _runs(result)})) for x in fields),
        ]
        for name, result in sorted(results.items())
    ]
    return markdown(["", "what", *fields], rows)
