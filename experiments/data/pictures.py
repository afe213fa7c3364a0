"""Draws the pictures of docs/data.md.

    python -m experiments.data.pictures --data_dir=data --out=docs

image.png shows a photograph of each class of the test split, pathfinder.png images of both labels
at 32 x 32 pixels, and pathx.png one of each label at 128 x 128. The photographs are prepared first
if they are missing (--source=DIR names the published files); Pathfinder's images are generated.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from skyformer_jax import cli, tasks
from skyformer_jax.data import pathfinder

_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of all data sets.")
_SOURCE = flags.DEFINE_string("source", None, "Folder or archive of the published photographs.")
_OUT = flags.DEFINE_string("out", "docs", "Folder to write to.")

_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_LABELS = ("label 0", "label 1")
_DRAWN = 32  # images to generate; the first ones of each label are shown
_DPI = 100
_GAP, _TITLE = 8, 24  # pixels between pictures, and for a title


def draw(
    pictures: np.ndarray,
    path: Path,
    scale: int,
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> None:
    """Writes a grid of gray pictures, uint8 [rows, columns, side, side], with titles.

    Each pixel becomes a square of `scale` x `scale` pixels.
    """
    num_rows, num_columns, side, _ = pictures.shape
    side *= scale
    left, top = (_TITLE if titles else _GAP for titles in (rows, columns))
    width, height = left + num_columns * (side + _GAP), top + num_rows * (side + _GAP)
    figure = plt.figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.subplots(
        num_rows,
        num_columns,
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": [], "frame_on": False},
    )
    figure.subplots_adjust(
        *(left / width, _GAP / height, 1 - _GAP / width, 1 - top / height),
        wspace=_GAP / side,
        hspace=_GAP / side,
    )
    for (row, column), axis in np.ndenumerate(axes):
        axis.imshow(pictures[row, column], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for axis, title in zip(axes[0], columns, strict=False):
        axis.set_title(title, size=8)
    for axis, title in zip(axes[:, 0], rows, strict=False):
        axis.set_ylabel(title, size=8)
    figure.savefig(path)
    plt.close(figure)


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the first `count` examples of each label, int [labels, count]."""
    return np.stack([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)])


def main() -> None:
    """Draws all three pictures."""
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)

    photographs = tasks.get("image").load("test", _DATA_DIR.value, source=_SOURCE.value)
    chosen = first_of_each(photographs.label, 1)[:, 0]
    pictures = [photographs[i]["tokens"].reshape(32, 32) for i in chosen]
    draw(np.stack(pictures)[None], out / "image.png", 2, columns=_CLASSES)

    images, labels = pathfinder.generate(_DRAWN, size=32, workers=1)
    draw(images[first_of_each(labels, 6)], out / "pathfinder.png", 4, rows=_LABELS)

    images, labels = pathfinder.generate(_DRAWN, size=128, workers=1)
    draw(images[first_of_each(labels, 1).T], out / "pathx.png", 3, columns=_LABELS)


if __name__ == "__main__":
    cli.run(main)
