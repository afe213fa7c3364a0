"""Results of evaluations: confidence intervals, digests, summaries and tables."""

import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from skyformer_jax.training import config as configs
from skyformer_jax.training.defaults import added_fields


def wilson_interval(accuracy: float, examples: int) -> tuple[float, float]:
    """Computes the 95 % confidence interval of a proportion (Wilson, 1927)."""
    z = 1.959964
    centre = accuracy + z * z / (2 * examples)
    half = z * math.sqrt(accuracy * (1 - accuracy) / examples + (z / (2 * examples)) ** 2)
    return (centre - half) / (1 + z * z / examples), (centre + half) / (1 + z * z / examples)


# Prefixes of fields for the location of files and the method of computation.
_UNDIGESTED = ("version", "data.dir", "compilation_cache", "train.accumulation", "parallel.")


def config_digest(config: ml_collections.ConfigDict) -> str:
    """Returns the first 16 hex digits of the SHA-256 of the fields that affect the result.

    A field that a later version added counts only if it differs from the earlier behaviour, so that
    earlier results keep their digests.
    """
    added = added_fields(config)
    fields = configs.flatten(configs.to_dict(config))
    fields["data.kind"] = fields["data.kind"] or added["data.kind"]
    flat = {
        field: value
        for field, value in fields.items()
        if not field.startswith(_UNDIGESTED) and not (field in added and value == added[field])
    }
    flat["data.source"] = bool(flat["data.source"])  # whether a source was named, not which
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def summarise(of_seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Summarises the results of several seeds: common fields, means and standard deviation."""
    found = list(of_seeds.values())
    accuracies = [result["accuracy"] for result in found]
    return {
        **{k: found[0][k] for k in ("task", "attention", "split", "examples", "floors", "data")},
        "accuracy": float(np.mean(accuracies)),
        "standard_deviation": float(np.std(accuracies, ddof=1)),
        "loss": float(np.mean([result["loss"] for result in found])),
        "seconds": round(sum(result["seconds"] for result in found), 2),
        "seeds": {
            str(seed): {k: result[k] for k in ("accuracy", "loss", "checkpoint", "validation")}
            for seed, result in of_seeds.items()
        },
    }


def result_table(result: dict[str, Any]) -> str:
    """Formats a result of evaluate as a text table."""
    head = f"{result['task']} {result['split']}, {result['examples']:,} examples, "
    head += f"{result['attention']}, "
    if "seeds" in result:
        lines = [head + f"{len(result['seeds'])} seeds", *_lines_of_seeds(result)]
    else:
        lines = [head + f"checkpoint of step {result['checkpoint']}", *_lines_of_model(result)]
    return "\n".join([*lines, f"  {'evaluated in':<28}{result['seconds']:6.2f} s"])


def _lines_of_model(result: dict[str, Any]) -> list[str]:
    low, high = result["interval_95"]
    classes = "  ".join(
        f"{i}: {'-' if a is None else f'{100 * a:.0f} %'}"
        for i, a in enumerate(result["per_class_accuracy"])
    )
    lines = [
        f"  {'accuracy':<28}{100 * result['accuracy']:6.2f} %   "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f})",
        *(
            [f"  {'as released':<28}{100 * result['released']:6.2f} %"]
            if "released" in result
            else []
        ),
        *_lines_of_floors_and_loss(result),
        f"  accuracy of each class      {classes}",
    ]
    if "landmark_draws" in result:
        draws = result["landmark_draws"]
        deviation = draws["standard_deviation"]
        lines.append(
            f"  {len(draws['accuracies'])} draws of landmarks".ljust(30)
            + f"{100 * draws['mean']:6.2f} % mean"
            + ("" if deviation is None else f", standard deviation {100 * deviation:.2f}")
        )
    return lines


def _lines_of_seeds(result: dict[str, Any]) -> list[str]:
    return [
        f"  {'accuracy':<28}{100 * result['accuracy']:6.2f} %   "
        f"(standard deviation {100 * result['standard_deviation']:.2f})",
        *(
            f"  {'seed ' + seed:<28}{100 * one['accuracy']:6.2f} %   "
            f"(checkpoint of step {one['checkpoint']})"
            for seed, one in result["seeds"].items()
        ),
        *_lines_of_floors_and_loss(result),
    ]


def _lines_of_floors_and_loss(result: dict[str, Any]) -> list[str]:
    return [
        *(
            f"  {'floor: ' + floor:<28}{100 * accuracy:6.2f} %"
            for floor, accuracy in result["floors"].items()
        ),
        f"  {'loss':<28}{result['loss']:6.4f} nats",
    ]


def print_summary(workdir: Path, result: dict[str, Any]) -> None:
    """Prints the result of a finished run and the locations of its files."""
    print(result_table(result))
    if "seeds" in result:
        print(f"\neach seed         {workdir}/seed-*: checkpoints, metrics, learning curve")
    else:
        validation, curve = result["validation"], workdir / "learning_curve.png"
        print(
            f"\nbest checkpoint   {workdir}/checkpoints/{result['checkpoint']} "
            f"(validation accuracy {100 * validation['accuracy']:.2f} %)\n"
            f"metrics           {workdir}/metrics.jsonl"
            + (f"\nlearning curve    {curve}" if curve.exists() else "")
        )
    print(
        f"TensorBoard       {shlex.join(['tensorboard', '--logdir', str(workdir)])}\n"
        f"evaluate again    {shlex.join(['python', 'eval.py', f'--workdir={workdir}'])}"
    )
