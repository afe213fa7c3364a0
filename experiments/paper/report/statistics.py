"""Computes the statistics of the report: means, differences and their standard errors."""

import math
import operator
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from skyformer_jax.attention import NAMES

Row = dict[str, Any]
Result = dict[str, Any]


class Estimate(NamedTuple):
    """A mean of `count` independent runs and its standard error, None if it is unknown."""

    value: float
    error: float | None
    count: int


def minus(a: Estimate, b: Estimate) -> Estimate:
    """Returns the difference of two independent estimates."""
    error = None if None in (a.error, b.error) else math.hypot(a.error, b.error)
    return Estimate(a.value - b.value, error, min(a.count, b.count))


def mean(estimates: list[Estimate]) -> Estimate:
    """Returns the mean of independent estimates."""
    values, errors, counts = zip(*estimates, strict=True)
    error = None if None in errors else math.hypot(*errors) / len(errors)
    return Estimate(statistics.fmean(values), error, min(counts))


def error_of_mean(values: Sequence[float]) -> float | None:
    """Returns the standard error of a mean from the spread of its values, None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def finished(result: Result) -> list[Row]:
    """Returns the finished cells of table1.json."""
    return [cell for cell in result["cells"] if cell["status"] == "finished"]


def measured(result: Result) -> list[Row]:
    """Returns the rows that were not skipped."""
    return [row for row in result["rows"] if "skipped" not in row]


def group(rows: Iterable[Row], *fields: str) -> dict[Any, Any]:
    """Groups rows as {value of the first field: {value of the second: ... [rows]}}.

    Values are in the order of the rows, but attentions are in the order of NAMES.
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
    """Returns test accuracies in percent of table1.json, {config: {attention: mean over seeds}}.

    The variance between seeds is assumed to be the same for all attentions of a task, and is pooled
    over them. If no attention has two seeds, the error is that of a test set of this size alone.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for config, of_name in group(finished(result), "config", "attention").items():
        percents = {name: [100 * cell["accuracy"] for cell in own] for name, own in of_name.items()}
        means = {name: statistics.fmean(own) for name, own in percents.items()}
        squares = sum((x - means[name]) ** 2 for name, own in percents.items() for x in own)
        freedom = sum(len(own) - 1 for own in percents.values())
        found[config] = {}
        for name, value in means.items():
            of_test_set = value * (100 - value) / of_name[name][0]["examples"]
            variance, count = squares / freedom if freedom else of_test_set, len(percents[name])
            found[config][name] = Estimate(value, math.sqrt(variance / count), count)
    return found


def instability_ratios(
    result: Result, field: str = "instability"
) -> dict[str, dict[str, Estimate]]:
    """Returns mean scores of stability.json over softmax's, {config: {attention: ratio}}.

    With several seeds the value is the mean of their ratios, and the error comes from their spread.
    With one seed the error comes from the spread of the ratio between steps, as if the steps were
    independent.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for config, of_name in group(measured(result), "config", "attention").items():
        softmax = {row["seed"]: row[field] for row in of_name.pop("softmax", [])}
        for name, rows in of_name.items():
            pairs = [(row[field], softmax[row["seed"]]) for row in rows if row["seed"] in softmax]
            if not pairs:
                continue
            ratios = [statistics.fmean(ours) / statistics.fmean(theirs) for ours, theirs in pairs]
            of_steps = [a / b for a, b in zip(*pairs[0], strict=True)]
            error = error_of_mean(ratios if len(ratios) > 1 else of_steps)
            ratio = Estimate(statistics.fmean(ratios), error, len(ratios))
            found.setdefault(config, {})[name] = ratio
    return found


def noise_of_softmax(result: Result) -> dict[str, float]:
    """Returns the factor by which training's noise raises softmax's mean score, by config.

    The scores are those of stability.json. Of several seeds, the last one counts.
    """
    return {
        row["config"]: statistics.fmean(row["instability_with_noise"])
        / statistics.fmean(row["instability"])
        for row in measured(result)
        if row["attention"] == "softmax"
    }


def cost_ratios(result: Result, field: str) -> dict[str, dict[str, Estimate]]:
    """Returns a field of table2.json over softmax's, {config: {attention: ratio}}.

    The error of a time comes from the ratios of the turns; that of memory is None.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for config, of_name in group(measured(result), "config", "attention").items():
        for name, (row, *_) in of_name.items() if "softmax" in of_name else ():
            softmax, error = of_name["softmax"][0], None
            if field == "seconds_per_step":
                turns = zip(row["seconds"], softmax["seconds"], strict=False)
                error = error_of_mean([a / b for a, b in turns])
            ratio = Estimate(row[field] / softmax[field], error, 1)
            found.setdefault(config, {})[name] = ratio
    return found


def spectral_errors(result: Result) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """Returns the median relative errors of figure1.json.

    They are {(weights, length): {attention: {features: relative error}}}.
    """
    return {
        (weights, length): {
            name: {row["num_features"]: row["relative_error"]["median"] for row in rows}
            for name, rows in of_name.items()
        }
        for weights, of_length in group(result["rows"], "weights", "length", "attention").items()
        for length, of_name in of_length.items()
    }


def mean_curves(result: Result) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """Returns the curves of figure2.json, means over the seeds.

    They are {config: {attention: [(seconds, accuracy, loss)]}}.
    """

    def mean_curve(rows: list[Row]) -> list[tuple[float, float, float]]:
        columns = operator.itemgetter("seconds", "accuracy", "loss")
        curves = [[columns(point) for point in row["validation"]] for row in rows]
        return [tuple(point) for point in np.mean(curves, axis=0).tolist()]

    return {
        config: {name: mean_curve(rows) for name, rows in of_name.items()}
        for config, of_name in group(result["rows"], "config", "attention").items()
    }
