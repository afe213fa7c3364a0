"""Which claims of the paper the results bear out, each decided by a stated rule."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from skyformer_jax.report import statistics
from skyformer_jax.report.statistics import Estimate, Result

CONFIRMED, NOT_CONFIRMED, NOT_RUN = "confirmed", "not confirmed", "not yet run"
# Points of accuracy by which one may be behind another and still match it.
_MARGIN = 1.0


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
      claim: in words.
      rule: when it counts as confirmed.
      status: CONFIRMED, NOT_CONFIRMED or NOT_RUN.
      reduced: whether the runs that decided it are reduced ones.
      evidence: the figures that decided, in words.
    """

    claim: str
    rule: str
    status: str
    reduced: bool
    evidence: str


class Claim(NamedTuple):
    """A claim of the paper.

    Attributes:
      text: in words.
      rule: when it counts as confirmed.
      results: names of the results that it needs.
      decide: of these results, whether it holds, and the evidence; None if they lack what it needs.
    """

    text: str
    rule: str
    results: tuple[str, ...]
    decide: Callable[..., tuple[bool, str] | None]


def _percent_points(difference: Estimate) -> str:
    error = "" if difference.error is None else f" ± {difference.error:.2f}"
    return f"{difference.value:+.2f}{error}"


def _at_least_matches(name: str, other: str) -> Callable[[Result], tuple[bool, str] | None]:
    def decide(table1: Result) -> tuple[bool, str] | None:
        differences = {
            config: statistics.minus(of_task[name], of_task[other])
            for config, of_task in statistics.accuracies(table1).items()
            if name in of_task and other in of_task
        }
        if not differences:
            return None
        mean = statistics.mean(list(differences.values()))
        tasks = ", ".join(f"{config} {_percent_points(d)}" for config, d in differences.items())
        lower = mean.value - 2 * (mean.error or 0)
        return lower > -_MARGIN, f"mean {_percent_points(mean)} points; {tasks}"

    return decide


def _best_average(table1: Result) -> tuple[bool, str] | None:
    accuracies = statistics.accuracies(table1)
    everywhere = [
        name
        for name in next(iter(accuracies.values()), {})
        if all(name in of_task for of_task in accuracies.values())
    ]
    if "skyformer" not in everywhere or len(everywhere) < 2:
        return None
    means = {
        name: statistics.mean([of_task[name] for of_task in accuracies.values()])
        for name in everywhere
    }
    ranked = sorted(means, key=lambda name: -means[name].value)
    evidence = ", ".join(f"{name} {means[name].value:.2f}" for name in ranked)
    return ranked[0] == "skyformer", f"{evidence} (mean of {', '.join(accuracies)})"


def _stability(
    name: str, holds: Callable[[float], bool]
) -> Callable[[Result], tuple[bool, str] | None]:
    def decide(stability: Result) -> tuple[bool, str] | None:
        ratios = {
            config: of_config[name]
            for config, of_config in statistics.instability_ratios(stability).items()
            if name in of_config
        }
        if not ratios:
            return None
        noisy = statistics.instability_ratios(stability, "instability_with_noise")
        evidence = ", ".join(f"{config} {ratio.value:.2f}" for config, ratio in ratios.items())
        with_noise = ", ".join(f"{config} {noisy[config][name].value:.2f}" for config in ratios)
        return (
            all(holds(ratio.value) for ratio in ratios.values()),
            f"{evidence} of softmax's; with the noise of training in f {with_noise}",
        )

    return decide


def _cheaper(
    name: str, other: str, field: str, what: str
) -> Callable[[Result], tuple[bool, str] | None]:
    def decide(table2: Result) -> tuple[bool, str] | None:
        ratios = {
            config: of_config[name] / of_config[other]
            for config, of_config in statistics.cost_ratios(table2, field).items()
            if name in of_config and other in of_config
        }
        if not ratios:
            return None
        evidence = ", ".join(f"{config} {ratio:.2f}" for config, ratio in ratios.items())
        return all(ratio < 1 for ratio in ratios.values()), f"{what} over {other}'s: {evidence}"

    return decide


def _error_falls(figure1: Result) -> tuple[bool, str] | None:
    panels = statistics.spectral_errors(figure1)
    falls, texts = [], []
    for (weights, length), of_name in panels.items():
        errors = [error for _, error in sorted(of_name.get("skyformer", {}).items())]
        if len(errors) > 1:
            falls.append(all(b < a for a, b in itertools.pairwise(errors)))
            texts.append(f"{weights} {length:,}: {errors[0]:.3f} to {errors[-1]:.3f}")
    return (all(falls), "; ".join(texts)) if falls else None


def _least_error(figure1: Result) -> tuple[bool, str] | None:
    best, count, winners = 0, 0, {}
    for (_, length), of_name in statistics.spectral_errors(figure1).items():
        for num_features in figure1["features"]:
            if num_features >= length:  # most are exact
                continue
            errors = {n: e[num_features] for n, e in of_name.items() if num_features in e}
            if "skyformer" in errors and len(errors) > 1:
                winner = min(errors, key=errors.get)
                best, count = best + (winner == "skyformer"), count + 1
                winners[winner] = winners.get(winner, 0) + 1
    if not count:
        return None
    ranked = sorted(winners.items(), key=lambda item: -item[1])
    return best == count, f"least error in so many of {count} settings: " + ", ".join(
        f"{name} {number}" for name, number in ranked
    )


def _sooner(figure2: Result) -> tuple[bool, str] | None:
    sooner, texts = [], []
    for config, of_config in statistics.mean_curves(figure2).items():
        if not {"skyformer", "softmax"} <= of_config.keys():
            continue
        wanted = max(accuracy for _, accuracy, _ in of_config["softmax"])
        softmax, skyformer = (
            next((time for time, accuracy, _ in of_config[name] if accuracy >= wanted), None)
            for name in ("softmax", "skyformer")
        )
        sooner.append(skyformer is not None and skyformer < softmax)
        share = "never" if skyformer is None else f"{skyformer / softmax:.2f} of the time"
        texts.append(f"{config} {100 * wanted:.1f} %: {share}")
    return (all(sooner), "; ".join(texts)) if sooner else None


_ALL_TASKS = "in every task measured"
_MATCHES = f"the mean difference over the tasks is above -{_MARGIN:g} point by two standard errors"
CLAIMS = (
    Claim(
        "Kernelized attention is more stable than softmax",
        f"instability ratio below 1 {_ALL_TASKS}",
        ("stability",),
        _stability("kernelized", lambda ratio: ratio < 1),
    ),
    Claim(
        "Skyformer is more stable than softmax",
        f"instability ratio below 1 {_ALL_TASKS}",
        ("stability",),
        _stability("skyformer", lambda ratio: ratio < 1),
    ),
    Claim(
        "Nystromformer is as unstable as softmax",
        f"instability ratio between 0.9 and 1.1 {_ALL_TASKS}",
        ("stability",),
        _stability("nystromformer", lambda ratio: 0.9 < ratio < 1.1),
    ),
    Claim(
        "Kernelized attention at least matches softmax's accuracy",
        _MATCHES,
        ("table1",),
        _at_least_matches("kernelized", "softmax"),
    ),
    Claim(
        "Skyformer at least matches softmax's accuracy",
        _MATCHES,
        ("table1",),
        _at_least_matches("skyformer", "softmax"),
    ),
    Claim(
        "Skyformer loses nothing against kernelized attention",
        _MATCHES,
        ("table1",),
        _at_least_matches("skyformer", "kernelized"),
    ),
    Claim(
        "Skyformer has the best average accuracy of the nine",
        "its mean over the tasks is the highest",
        ("table1",),
        _best_average,
    ),
    Claim(
        "Skyformer is faster than softmax",
        f"less time a step {_ALL_TASKS}",
        ("table2",),
        _cheaper("skyformer", "softmax", "seconds_per_step", "time"),
    ),
    Claim(
        "Skyformer needs less memory than softmax",
        f"less memory of a step {_ALL_TASKS}",
        ("table2",),
        _cheaper("skyformer", "softmax", "bytes", "memory"),
    ),
    Claim(
        "Kernelized attention is faster than softmax",
        f"less time a step {_ALL_TASKS}",
        ("table2",),
        _cheaper("kernelized", "softmax", "seconds_per_step", "time"),
    ),
    Claim(
        "Nystromformer is faster than Skyformer",
        f"less time a step {_ALL_TASKS}",
        ("table2",),
        _cheaper("nystromformer", "skyformer", "seconds_per_step", "time"),
    ),
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
    """All claims, by the results that there are, {name of the file without .json: content}."""
    verdicts = []
    for claim in CLAIMS:
        there = [results.get(name) for name in claim.results]
        decided = None if None in there else claim.decide(*there)
        status = NOT_RUN if decided is None else CONFIRMED if decided[0] else NOT_CONFIRMED
        evidence = "" if decided is None else decided[1]
        reduced = decided is not None and any(map(is_reduced, there))
        verdicts.append(Verdict(claim.text, claim.rule, status, reduced, evidence))
    return verdicts


def is_reduced(result: Result) -> bool:
    """Whether a result's setting is not that of the paper; fewer seeds are not counted.

    Scores of a training step, of some of its batch's examples alone, are reduced as well.
    """
    rows = result.get("cells", result.get("rows", []))
    return (
        result.get("small", False)
        or any(row.get("departures") for row in rows)
        or bool(result.get("training", {}).get("departures"))
        or any(row["examples"] < row["batch_size"] for row in rows if "instability" in row)
    )
