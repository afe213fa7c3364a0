"""Draws the pictures of docs/data.md.

    python -m experiments.data.pictures --data_dir=data --out=docs

image.png shows a photograph of each class of the test split, pathfinder.png images of both labels
at 32 x 32 pixels, and pathx.png one of each label at 128 x 128. The photographs are prepared if
they are not (--source=DIR names the published files); Pathfinder's images are drawn.
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
_DRAWN = 32  # images of which the first of each label are shown
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
    """Writes a grid of gray pictures, in which each of their pixels is a square.

    Args:
      pictures: uint8 [rows, columns, side, side].
      path: of the PNG.
      scale: side of the squares in pixels.
      columns: titles of the columns, if any.
      rows: titles of the rows, if any.
    """
    left, top = (_TITLE if titles else _GAP for titles in (rows, columns))
    squares = np.kron(pictures, np.ones((scale, scale), np.uint8))
    cells = np.pad(squares, [(0, 0), (0, 0), (0, _GAP), (0, _GAP)], constant_values=255)
    num_rows, num_columns, step, _ = cells.shape
    grid = cells.transpose(0, 2, 1, 3).reshape(num_rows * step, num_columns * step)
    canvas = np.pad(grid, [(top, 0), (left, 0)], constant_values=255)
    height, width = canvas.shape
    figure = plt.figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    figure.figimage(canvas, cmap="gray", vmin=0, vmax=255)
    style = {"size": 8, "ha": "center", "va": "center"}
    centre = (step - _GAP) // 2
    for column, title in enumerate(columns):
        x, y = left + column * step + centre, top // 2
        figure.text(x / width, 1 - y / height, title, **style)
    for row, title in enumerate(rows):
        x, y = left // 2, top + row * step + centre
        figure.text(x / width, 1 - y / height, title, rotation=90, **style)
    figure.savefig(path)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` examples of each label, int [labels, count]."""
    return np.stack([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)])


def main() -> None:
    """Draws all three."""
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
