"""What the report computes from results: means, differences and their standard errors."""

import math
import statistics
from typing import Any, NamedTuple

from skyformer_jax.attention import NAMES

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
    """The difference of two independent ones."""
    known = a.error is not None and b.error is not None
    error = math.hypot(a.error, b.error) if known else None
    return Estimate(a.value - b.value, error, min(a.count, b.count))


def mean(estimates: list[Estimate]) -> Estimate:
    """The mean of independent ones."""
    known = all(e.error is not None for e in estimates)
    error = math.hypot(*(e.error for e in estimates)) / len(estimates) if known else None
    value = statistics.fmean(e.value for e in estimates)
    return Estimate(value, error, min(e.count for e in estimates))


def accuracies(result: Result) -> dict[str, dict[str, Estimate]]:
    """Test accuracy in percent of table1.json, {config: {attention: mean over the seeds}}.

    The variance between seeds is taken to be the same for all attentions of a task, and pooled over
    them. Where none has two seeds, the error is that of a test set of this size alone.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in result["cells"]:
        if cell["status"] == "finished":
            found.setdefault(cell["config"], {}).setdefault(cell["attention"], []).append(cell)
    return {config: _of_task(cells) for config, cells in found.items()}


def _of_task(cells: dict[str, list[dict[str, Any]]]) -> dict[str, Estimate]:
    percents = {name: [100 * cell["accuracy"] for cell in own] for name, own in cells.items()}
    squares = sum((x - statistics.fmean(own)) ** 2 for own in percents.values() for x in own)
    freedom = sum(len(own) - 1 for own in percents.values())
    estimates = {}
    for name in (name for name in NAMES if name in percents):
        own = percents[name]
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
    scores: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in result["rows"]:
        if "skipped" not in row:
            of_config = scores.setdefault(row["config"], {})
            of_config.setdefault(row["attention"], {})[row["seed"]] = row[field]
    found: dict[str, dict[str, Estimate]] = {}
    for config, of_config in scores.items():
        for name in (n for n in NAMES if n in of_config and n != "softmax"):
            pairs = [
                (of_seed, of_config["softmax"][seed])
                for seed, of_seed in of_config[name].items()
                if seed in of_config.get("softmax", {})
            ]
            if pairs:
                found.setdefault(config, {})[name] = _ratio(pairs)
    return found


def noise_of_softmax(result: Result) -> dict[str, float]:
    """By how much the noise of training raises softmax's mean score of stability.json, by config.

    Of several seeds the last one's.
    """
    return {
        row["config"]: statistics.fmean(row["instability_with_noise"])
        / statistics.fmean(row["instability"])
        for row in result["rows"]
        if "skipped" not in row and row["attention"] == "softmax"
    }


def _ratio(pairs: list[tuple[list[float], list[float]]]) -> Estimate:
    of_seeds = [statistics.fmean(a) / statistics.fmean(b) for a, b in pairs]
    spread = of_seeds
    if len(of_seeds) == 1:
        ((ours, softmax),) = pairs
        spread = [a / b for a, b in zip(ours, softmax, strict=True)]
    error = statistics.stdev(spread) / math.sqrt(len(spread)) if len(spread) > 1 else None
    return Estimate(statistics.fmean(of_seeds), error, len(of_seeds))


def cost_ratios(result: Result, field: str) -> dict[str, dict[str, float]]:
    """A field of table2.json over softmax's, {config: {attention: ratio}}."""
    values: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if "skipped" not in row:
            values.setdefault(row["config"], {})[row["attention"]] = row[field]
    return {
        config: {name: own[name] / own["softmax"] for name in NAMES if name in own}
        for config, own in values.items()
        if "softmax" in own
    }


def time_ratio_error(result: Result, config: str, name: str) -> float | None:
    """Standard error of a ratio of times, from the turns' own ratios."""
    turns = {
        row["attention"]: row["seconds"]
        for row in result["rows"]
        if row["config"] == config and "skipped" not in row
    }
    ratios = [a / b for a, b in zip(turns[name], turns["softmax"], strict=False)]
    return statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None


def spectral_errors(result: Result) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """Medians of figure1.json, {(weights, length): {attention: {features: relative error}}}."""
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for row in result["rows"]:
        panel = found.setdefault((row["weights"], row["length"]), {})
        of_name = panel.setdefault(row["attention"], {})
        of_name[row["num_features"]] = row["relative_error"]["median"]
    return found


def mean_curves(result: Result) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """figure2.json, {config: {attention: [(seconds, accuracy, loss)]}}, means over the seeds."""
    curves: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for row in result["rows"]:
        of_config = curves.setdefault(row["config"], {})
        of_config.setdefault(row["attention"], []).append(row["validation"])
    return {
        config: {
            name: [
                tuple(
                    statistics.fmean(point[key] for point in points)
                    for key in ("seconds", "accuracy", "loss")
                )
                for points in zip(*of_seeds, strict=True)
            ]
            for name, of_seeds in of_config.items()
        }
        for config, of_config in curves.items()
    }
