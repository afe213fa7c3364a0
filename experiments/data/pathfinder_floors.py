"""Measures what the distance between the discs tells about Pathfinder: a floor for its accuracies.

    python -m experiments.data.pathfinder_floors --data_dir=data

Finds the two discs of each image, and answers for each whole number of pixels between them with the
commoner label of the training images. It reads nothing of the contours.
"""

from pathlib import Path

import numpy as np
from absl import flags

from experiments.data.pathfinder_discs import SIDE, find_discs
from experiments.records import provenance, write_json
from skyformer_jax import cli, tasks
from skyformer_jax.progress import track

_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
_SOURCE = flags.DEFINE_string("source", None, "Folder of the published images.")
_OUT = flags.DEFINE_string("out", "results/pathfinder_floors.json", "File to write.")

_AT_ONCE = 2000  # images


def distances(images: np.ndarray) -> np.ndarray:
    """Returns the distances between the discs of images, in whole pixels, int [images]."""
    first, second = find_discs(images)
    return np.round(np.hypot(*(first - second))).astype(int)


def fit(distance: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns the commoner label, 0 or 1, at each whole distance up to the diagonal."""
    counts = np.zeros((2 * SIDE, 2), int)
    np.add.at(counts, (distance, label), 1)
    return counts.argmax(axis=1)


def main() -> None:
    """Fits on the training images; prints and writes the accuracies on all splits."""
    task, options = tasks.get("pathfinder"), {"data_dir": _DATA_DIR.value, "source": _SOURCE.value}
    splits = {split: task.load(split, **options) for split in tasks.SPLITS}
    found = {}
    for split, examples in splits.items():
        images = examples.values.reshape(-1, SIDE, SIDE)
        starts = range(0, len(images), _AT_ONCE)
        parts = track(starts, len(starts), f"discs of {split}", "parts")
        found[split] = np.concatenate([distances(images[i : i + _AT_ONCE]) for i in parts])
    answers = fit(found["train"], splits["train"].label)
    accuracies = {
        split: float((answers[found[split]] == examples.label).mean())
        for split, examples in splits.items()
    }
    result = {
        "what": "accuracy of the commoner label at each distance of the discs of Pathfinder",
        **provenance(1),
        "data": {split: examples.checksum() for split, examples in splits.items()},
        "accuracy": accuracies,
    }
    write_json(Path(_OUT.value), result)
    print("  ".join(f"{split} {value:.4f}" for split, value in accuracies.items()))


if __name__ == "__main__":
    cli.run(main)
