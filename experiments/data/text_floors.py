"""Measures what counting tells about Text: floors for its accuracies.

    python -m experiments.data.text_floors --data_dir=data

Logistic regressions read how often each byte occurs in a review; and besides how often each hashed
n-gram of the variant "ngrams" of configs/text.py does. They read nothing else of the order. The
frequencies are divided by the number of bytes read, standardized by the training set and clipped at
five standard deviations. The strength of the penalty is the best on validation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
import scipy.optimize
from absl import flags

from configs import text
from experiments.records import Row, provenance, write_json
from skyformer_jax import cli, tasks
from skyformer_jax.data.batches import make_batch
from skyformer_jax.data.examples import Examples
from skyformer_jax.data.tokenizer import BYTES
from skyformer_jax.ngrams import hashed_ngrams

_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
_SOURCE = flags.DEFINE_string("source", None, "Folder of the published reviews.")
_OUT = flags.DEFINE_string("out", "results/text_floors.json", "File to write.")

_PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_AT_ONCE = 256  # reviews


def frequencies(examples: Examples, ngrams: Sequence[int], num_rows: int) -> np.ndarray:
    """Returns the share of each byte, and of the n-grams of each length in each of their rows.

    Args:
      examples: the reviews.
      ngrams: lengths of n-grams, hashed as a model with model.ngrams hashes them.
      num_rows: rows of the table of each of them.

    Returns:
      float32 [examples, 256 + len(ngrams) * num_rows].
    """
    longest = int(examples.lengths.max())
    hashes = [jax.jit(lambda tokens, n=n: hashed_ngrams(tokens, n, num_rows)) for n in ngrams]
    found = np.empty((len(examples), 256 + len(ngrams) * num_rows), np.float32)
    for start in range(0, len(examples), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(examples)))
        batch = make_batch(examples, rows, longest)
        real = np.arange(longest) < batch.length[:, None]
        tokens = np.where(real, BYTES(batch.tokens), 0)
        columns, first = [batch.tokens.astype(np.int64)], 256
        for hashed in hashes:
            columns.append(first + np.asarray(hashed(tokens)))
            first += num_rows
        for i, row in enumerate(rows):
            counts = np.bincount(
                np.stack([x[i] for x in columns])[:, real[i]].ravel(), minlength=first
            )
            found[row] = counts / batch.length[i]
    return found


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


def regress(splits: Mapping[str, Examples], ngrams: Sequence[int], num_rows: int) -> list[Row]:
    """Fits a regression with each penalty; returns the accuracies on all splits."""
    features = {split: frequencies(x, ngrams, num_rows) for split, x in splits.items()}
    mean, deviation = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
    for x in features.values():  # in place, since they take gigabytes
        x -= mean
        x /= deviation
        np.clip(x, -5, 5, out=x)
    rows = []
    for penalty in _PENALTIES:
        weights = fit(features["train"], splits["train"].label, penalty)
        found = {s: accuracy(weights, features[s], splits[s].label) for s in splits}
        rows.append({"ngrams": list(ngrams), "penalty": penalty, **found})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """Fits, prints and writes the accuracies."""
    task, options = tasks.get("text"), {"data_dir": _DATA_DIR.value, "source": _SOURCE.value}
    splits = {split: task.load(split, **options) for split in tasks.SPLITS}
    model = text.get_config("skyformer,ngrams").model
    of_features = [regress(splits, ngrams, model.ngram_rows) for ngrams in ((), model.ngrams)]
    result = {
        "what": "accuracy of logistic regressions on frequencies of bytes and n-grams of Text",
        **provenance(jax.device_count()),
        "data": {split: examples.checksum() for split, examples in splits.items()},
        "rows": [row for rows in of_features for row in rows],
        "best": [max(rows, key=lambda row: row["validation"]) for rows in of_features],
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
