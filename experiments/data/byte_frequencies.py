"""Measures what the frequencies of single bytes tell about Text: a floor for its accuracies.

    python -m experiments.data.byte_frequencies --data_dir=data

A logistic regression reads how often each byte occurs in a review, and nothing of the order. The
frequencies are divided by the number of bytes read, standardised by the training set and clipped at
five standard deviations. The strength of the penalty is the best on validation.
"""

from pathlib import Path

import jax
import numpy as np
import optax
import scipy.optimize
from absl import flags

from experiments.records import provenance, write_json
from skyformer_jax import cli, tasks
from skyformer_jax.data.examples import Examples

_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
_SOURCE = flags.DEFINE_string("source", None, "Folder of the published reviews.")
_OUT = flags.DEFINE_string("out", "results/byte_frequencies.json", "File to write.")

_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)


def frequencies(examples: Examples) -> np.ndarray:
    """Returns the share of each byte in each example, float32 [examples, 256]."""
    bounds = zip(examples.starts[:-1], examples.starts[1:], strict=True)
    counts = [np.bincount(examples.values[i:j], minlength=256) for i, j in bounds]
    return np.array(counts, np.float32) / examples.lengths.sum(axis=1, keepdims=True)


def fit(features: np.ndarray, label: np.ndarray, penalty: float) -> np.ndarray:
    """Fits a logistic regression; returns its weights and, at the end, its bias.

    Args:
      features: float32 [examples, features].
      label: int [examples], 0 or 1.
      penalty: the factor of the squared weights in the loss, which is a mean over the examples.
    """

    @jax.jit
    @jax.value_and_grad
    def loss(weights: jax.Array) -> jax.Array:
        logits = features @ weights[:-1] + weights[-1]
        entropy = optax.sigmoid_binary_cross_entropy(logits, label).mean()
        return entropy + penalty * (weights[:-1] ** 2).sum()

    start = np.zeros(features.shape[1] + 1)
    return scipy.optimize.minimize(
        lambda x: [np.float64(y) for y in loss(x)], start, jac=True, method="L-BFGS-B"
    ).x


def accuracy(weights: np.ndarray, features: np.ndarray, label: np.ndarray) -> float:
    """Returns the share of examples that the regression classifies correctly."""
    return float(((features @ weights[:-1] + weights[-1] > 0) == label).mean())


def main() -> None:
    """Fits, prints and writes the accuracies."""
    task, options = tasks.get("text"), {"data_dir": _DATA_DIR.value, "source": _SOURCE.value}
    splits = {split: task.load(split, **options) for split in tasks.SPLITS}
    features = {split: frequencies(examples) for split, examples in splits.items()}
    mean, deviation = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
    features = {split: np.clip((x - mean) / deviation, -5, 5) for split, x in features.items()}
    rows = []
    for penalty in _PENALTIES:
        weights = fit(features["train"], splits["train"].label, penalty)
        found = {s: accuracy(weights, features[s], splits[s].label) for s in splits}
        rows.append({"penalty": penalty, **found})
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    result = {
        "what": "accuracy of a logistic regression on the byte frequencies of Text's reviews",
        **provenance(jax.device_count()),
        "data": {split: examples.checksum() for split, examples in splits.items()},
        "rows": rows,
        "best": max(rows, key=lambda row: row["validation"]),
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
