"""Decides which claims of the paper the results confirm, each by a stated rule."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.paper.report import statistics
from experiments.paper.report.statistics import Estimate, Result
from skyformer_jax.attention import NAMES

CONFIRMED, NOT_CONFIRMED, NOT_RUN = "confirmed", "not confirmed", "not yet run"
# How runs relate to the paper's, from the best evidence to the weakest: its setting; the full tasks
# and models by the variant fast of the configs; anything smaller.
FULL, FAST, REDUCED = _KINDS = ("full", "variant fast", "reduced")
# Fields that may depart from a setting without reducing it: buckets only change the padding.
_NO_REDUCTION = {"data.buckets"}
# Points of accuracy by which an attention may be behind another and still match it.
_MARGIN = 1.0

_ALL_TASKS = "in every task measured"
_ACCURACIES = ("table1", "fast")

# Whether a result confirms a claim, and the deciding figures; None if it lacks what is needed.
Decision = tuple[bool, str] | None


class Claim(NamedTuple):
    """A claim of the paper, the rule that confirms it, and the files of results/ that may decide.

    Of several files, the one whose runs are closest to the paper's decides.
    """

    text: str
    rule: str
    results: tuple[str, ...]
    decide: Callable[[Result], Decision]


class Verdict(NamedTuple):
    """The verdict on a claim; `evidence` has the deciding figures, `runs` the kind of the runs.

    Without runs, both are empty.
    """

    claim: str
    rule: str
    status: str
    runs: str
    evidence: str


def _both(of_configs: Mapping[str, Mapping[str, Any]], *names: str) -> dict[str, list[Any]]:
    """Returns {config: values of the named attentions} for the configs that have all of them."""
    return {
        config: [of_name[name] for name in names]
        for config, of_name in of_configs.items()
        if all(name in of_name for name in names)
    }


def _percent_points(difference: Estimate) -> str:
    error = "" if difference.error is None else f" ± {difference.error:.2f}"
    return f"{difference.value:+.2f}{error}"


def _accuracy(text: str, name: str, other: str) -> Claim:
    """Returns the claim that an attention is at least as accurate as another."""

    def decide(cells: Result) -> Decision:
        found = _both(statistics.accuracies(cells), name, other)
        if not found:
            return None
        differences = {config: statistics.minus(*pair) for config, pair in found.items()}
        mean = statistics.mean(list(differences.values()))
        tasks = ", ".join(f"{config} {_percent_points(d)}" for config, d in differences.items())
        lower = mean.value - 2 * (mean.error or 0)
        return lower > -_MARGIN, f"mean {_percent_points(mean)} points; {tasks}"

    mean = "the mean difference over the tasks"
    rule = f"{mean} is above -{_MARGIN:g} point by two standard errors"
    return Claim(text, rule, _ACCURACIES, decide)


def _best_average(cells: Result) -> Decision:
    accuracies = _both(statistics.accuracies(cells), *NAMES)
    if not accuracies:
        return None
    of_names = zip(NAMES, zip(*accuracies.values(), strict=True), strict=True)
    means = {name: statistics.mean(list(of_tasks)).value for name, of_tasks in of_names}
    ranked = sorted(means, key=means.get, reverse=True)
    evidence = ", ".join(f"{name} {means[name]:.2f}" for name in ranked)
    return ranked[0] == "skyformer", f"{evidence} (mean of {', '.join(accuracies)})"


def _listed(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{config} {ratio:.2f}" for config, ratio in ratios.items())


def _stability(text: str, name: str, low: float = 0.0, high: float = 1.0) -> Claim:
    """Returns the claim that an attention's instability ratio lies between two bounds."""

    def decide(stability: Result) -> Decision:
        ratios, noisy = (
            {
                config: ratio.value
                for config, (ratio,) in _both(
                    statistics.instability_ratios(stability, field), name
                ).items()
            }
            for field in ("instability", "instability_with_noise")
        )
        if not ratios:
            return None
        return (
            all(low < ratio < high for ratio in ratios.values()),
            f"{_listed(ratios)} of softmax's; with the noise of training in f {_listed(noisy)}",
        )

    bounds = f"between {low:g} and {high:g}" if low else f"below {high:g}"
    return Claim(text, f"instability ratio {bounds} {_ALL_TASKS}", ("stability",), decide)


def _cheaper(text: str, name: str, other: str, what: str = "time") -> Claim:
    """Returns the claim that an attention needs less time or memory than another."""
    field = {"time": "seconds_per_step", "memory": "bytes"}[what]

    def decide(table2: Result) -> Decision:
        found = _both(statistics.cost_ratios(table2, field), name, other)
        ratios = {config: ours.value / theirs.value for config, (ours, theirs) in found.items()}
        less = all(ratio < 1 for ratio in ratios.values())
        return (less, f"{what} over {other}'s: {_listed(ratios)}") if ratios else None

    return Claim(text, f"less {what} per step {_ALL_TASKS}", ("table2",), decide)


def _error_falls(figure1: Result) -> Decision:
    falls, texts = [], []
    for (weights, length), of_name in statistics.spectral_errors(figure1).items():
        errors = [error for _, error in sorted(of_name.get("skyformer", {}).items())]
        if len(errors) > 1:
            falls.append(all(b < a for a, b in itertools.pairwise(errors)))
            texts.append(f"{weights} {length:,}: {errors[0]:.3f} to {errors[-1]:.3f}")
    return (all(falls), "; ".join(texts)) if falls else None


def _least_error(figure1: Result) -> Decision:
    winners: Counter[str] = Counter()
    for (_, length), of_name in statistics.spectral_errors(figure1).items():
        for num_features in figure1["features"]:
            errors = {n: e[num_features] for n, e in of_name.items() if num_features in e}
            # With as many features as tokens, most approximations are exact.
            if num_features < length and "skyformer" in errors and len(errors) > 1:
                winners[min(errors, key=errors.get)] += 1
    evidence = ", ".join(f"{name} {count}" for name, count in winners.most_common())
    text = f"settings with the least error, of {winners.total()}: {evidence}"
    return (set(winners) == {"skyformer"}, text) if winners else None


def _sooner(figure2: Result) -> Decision:
    sooner, texts = [], []
    found = _both(statistics.mean_curves(figure2), "skyformer", "softmax")
    for config, curves in found.items():
        wanted = max(accuracy for _, accuracy, _ in curves[1])
        skyformer, softmax = (
            next((time for time, accuracy, _ in curve if accuracy >= wanted), None)
            for curve in curves
        )
        sooner.append(skyformer is not None and skyformer < softmax)
        share = "never" if skyformer is None else f"{skyformer / softmax:.2f} of the time"
        texts.append(f"{config} {100 * wanted:.1f} %: {share}")
    return (all(sooner), "; ".join(texts)) if sooner else None


CLAIMS = (
    _stability("Kernelized attention is more stable than softmax", "kernelized"),
    _stability("Skyformer is more stable than softmax", "skyformer"),
    _stability("Nystromformer is as unstable as softmax", "nystromformer", 0.9, 1.1),
    _accuracy("Kernelized attention at least matches softmax's accuracy", "kernelized", "softmax"),
    _accuracy("Skyformer at least matches softmax's accuracy", "skyformer", "softmax"),
    _accuracy("Skyformer loses nothing against kernelized attention", "skyformer", "kernelized"),
    Claim(
        "Skyformer has the best average accuracy of the nine",
        "its mean over the tasks on which all nine were trained is the highest",
        _ACCURACIES,
        _best_average,
    ),
    _cheaper("Skyformer is faster than softmax", "skyformer", "softmax"),
    _cheaper("Skyformer needs less memory than softmax", "skyformer", "softmax", "memory"),
    _cheaper("Kernelized attention is faster than softmax", "kernelized", "softmax"),
    _cheaper("Nystromformer is faster than Skyformer", "nystromformer", "skyformer"),
    Claim(
        "Skyformer reaches softmax's best validation accuracy in less time",
        f"less training time {_ALL_TASKS}, on the means over the seeds",
        ("figure2",),
        _sooner,
    ),
    Claim(
        "Skyformer's error falls with the number of features",
        "it falls from each number to the next, for all lengths and weights",
        ("figure1",),
        _error_falls,
    ),
    Claim(
        "Skyformer's error is the least of all approximations",
        "for all weights, lengths and numbers of features below the length",
        ("figure1",),
        _least_error,
    ),
)


def judge(results: dict[str, Any]) -> list[Verdict]:
    """Judges all claims by the results, {name of the file without .json: content}."""
    verdicts = []
    for text, rule, names, decide in CLAIMS:
        found = [results[name] for name in names if name in results]
        decided = [(_kind(result), decision) for result in found if (decision := decide(result))]
        if not decided:
            verdicts.append(Verdict(text, rule, NOT_RUN, "", ""))
            continue
        kind, (holds, evidence) = min(decided, key=lambda pair: _KINDS.index(pair[0]))
        verdicts.append(Verdict(text, rule, CONFIRMED if holds else NOT_CONFIRMED, kind, evidence))
    return verdicts


def _kind(result: Result) -> str:
    """Returns how a result's setting relates to the paper's; fewer seeds do not count.

    Instability scores on only some examples of each batch count as reduced as well.
    """
    rows = result.get("cells", result.get("rows", []))
    if (
        result.get("small", False)
        or result.get("variant") == "small"
        or any(row.get("departures", {}).keys() - _NO_REDUCTION for row in rows)
        or result.get("training", {}).get("departures")
        or any(row["examples"] < row["batch_size"] for row in rows if "instability" in row)
    ):
        return REDUCED
    return FAST if result.get("variant") == "fast" else FULL
