"""What the report computes from results: means, differences and their standard errors."""

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from skyformer_jax.attention import NAMES

Row = dict[str, Any]
Result = dict[str, Any]


class Estimate(NamedTuple):
    """A figure and its standard error.

    Attributes:
      value: the figure.
      error: its standard error; None where nothing is known of it.
      count: independent runs that it is the mean of.
    """

    value: float
    error: float | None
    count: int


def minus(a: Estimate, b: Estimate) -> Estimate:
    """The difference of two independent estimates."""
    known = a.error is not None and b.error is not None
    error = math.hypot(a.error, b.error) if known else None
    return Estimate(a.value - b.value, error, min(a.count, b.count))


def mean(estimates: list[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    known = all(e.error is not None for e in estimates)
    error = math.hypot(*(e.error for e in estimates)) / len(estimates) if known else None
    value = statistics.fmean(e.value for e in estimates)
    return Estimate(value, error, min(e.count for e in estimates))


def finished(result: Result) -> list[Row]:
    """The finished cells of table1.json."""
    return [cell for cell in result["cells"] if cell["status"] == "finished"]


def measured(result: Result) -> list[Row]:
    """The rows that were not skipped."""
    return [row for row in result["rows"] if "skipped" not in row]


def group(rows: Iterable[Row], *fields: str) -> dict[Any, Any]:
    """{value of the first field: {value of the second: ... [rows]}}, as the rows come.

    Attentions are in the order of NAMES.
    """
    found: dict[Any, Any] = {}
    for row in rows:
        found.setdefault(row[fields[0]], []).append(row)
    if fields[0] == "attention":
        found = {name: found[name] for name in NAMES if name in found}
    if len(fields) == 1:
        return found
    return {value: group(own, *fields[1:]) for value, own in found.items()}


def accuracies(result: Result) -> dict[str, dict[str, Estimate]]:
    """Test accuracy in percent of table1.json, {config: {attention: mean over the seeds}}.

    The variance between seeds is taken to be the same for all attentions of a task, and pooled over
    them. Where none has two seeds, the error is that of a test set of this size alone.
    """
    of_tasks = group(finished(result), "config", "attention")
    return {config: _of_task(of_name) for config, of_name in of_tasks.items()}


def _of_task(cells: dict[str, list[Row]]) -> dict[str, Estimate]:
    percents = {name: [100 * cell["accuracy"] for cell in own] for name, own in cells.items()}
    squares = sum((x - statistics.fmean(own)) ** 2 for own in percents.values() for x in own)
    freedom = sum(len(own) - 1 for own in percents.values())
    estimates = {}
    for name, own in percents.items():
        value = statistics.fmean(own)
        if freedom:
            variance = squares / freedom
        else:
            variance = value * (100 - value) / cells[name][0]["examples"]
        estimates[name] = Estimate(value, math.sqrt(variance / len(own)), len(own))
    return estimates


def instability_ratios(
    result: Result, field: str = "instability"
) -> dict[str, dict[str, Estimate]]:
    """A mean score of stability.json over softmax's, {config: {attention: ratio}}.

    With several seeds it is the mean of their ratios, and the error is from their spread. With one
    the error is from the spread of the ratio from step to step, as if steps were independent.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for config, of_name in group(measured(result), "config", "attention").items():
        softmax = {row["seed"]: row[field] for row in of_name.pop("softmax", [])}
        for name, rows in of_name.items():
            pairs = [(row[field], softmax[row["seed"]]) for row in rows if row["seed"] in softmax]
            if pairs:
                found.setdefault(config, {})[name] = _ratio(pairs)
    return found


def _ratio(pairs: list[tuple[list[float], list[float]]]) -> Estimate:
    of_seeds = [statistics.fmean(a) / statistics.fmean(b) for a, b in pairs]
    ratios = of_seeds
    if len(of_seeds) == 1:
        ((ours, softmax),) = pairs
        ratios = [a / b for a, b in zip(ours, softmax, strict=True)]
    return Estimate(statistics.fmean(of_seeds), _error_of_mean(ratios), len(of_seeds))


def _error_of_mean(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def noise_of_softmax(result: Result) -> dict[str, float]:
    """By how much the noise of training raises softmax's mean score of stability.json, by config.

    Of several seeds the last one's.
    """
    return {
        row["config"]: statistics.fmean(row["instability_with_noise"])
        / statistics.fmean(row["instability"])
        for row in measured(result)
        if row["attention"] == "softmax"
    }


def cost_ratios(result: Result, field: str) -> dict[str, dict[str, float]]:
    """A field of table2.json over softmax's, {config: {attention: ratio}}."""
    return {
        config: {name: rows[0][field] / own["softmax"][0][field] for name, rows in own.items()}
        for config, own in group(measured(result), "config", "attention").items()
        if "softmax" in own
    }


def time_ratio_error(result: Result, config: str, name: str) -> float | None:
    """Standard error of a ratio of times to softmax's, from the turns' own ratios."""
    own = group(measured(result), "config", "attention")[config]
    turns, of_softmax = own[name][0]["seconds"], own["softmax"][0]["seconds"]
    return _error_of_mean([a / b for a, b in zip(turns, of_softmax, strict=False)])


def spectral_errors(result: Result) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """Medians of figure1.json, {(weights, length): {attention: {features: relative error}}}."""
    return {
        (weights, length): {
            name: {row["num_features"]: row["relative_error"]["median"] for row in rows}
            for name, rows in of_name.items()
        }
        for weights, of_length in group(result["rows"], "weights", "length", "attention").items()
        for length, of_name in of_length.items()
    }


def mean_curves(result: Result) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """figure2.json, {config: {attention: [(seconds, accuracy, loss)]}}, means over the seeds."""
    return {
        config: {
            name: [
                tuple(
                    statistics.fmean(point[key] for point in points)
                    for key in ("seconds", "accuracy", "loss")
                )
                for points in zip(*(row["validation"] for row in rows), strict=True)
            ]
            for name, rows in of_name.items()
        }
        for config, of_name in group(result["rows"], "config", "attention").items()
    }
