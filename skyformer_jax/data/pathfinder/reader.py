"""Reads Pathfinder as published in the release of the Long Range Arena: PNGs and their metadata.

The folder pathfinder32/curv_contour_length_14/ holds imgs/N/sample_i.png and metadata/N.npy; easy
images are in curv_baseline/, intermediate ones in curv_contour_length_9/.
Despite its name a metadata file is text, one line for each image: subfolder, file, number, label,
continuity, contour length, distractor length, paddle length, thickness, margin and contrasts.
Files in NumPy's format with those columns are read too. A few PNGs of the release are empty.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from skyformer_jax.data import archives, parallel
from skyformer_jax.data.pathfinder.parameters import PUBLISHED
from skyformer_jax.errors import UserError

_MIN_COLUMNS = 11
_FILE, _LABEL = slice(0, 2), 3
_LABELS = {"0": 0, "1": 1}
_MAX_SKIPPED = 0.01
_NAMED = 5  # number of skipped images that a report names


class Block(NamedTuple):
    """The images of one metadata file.

    Attributes:
      names: names such as "curv_contour_length_14/imgs/0/sample_0.png".
      images: uint8 [images, pixels], row by row.
      labels: uint8 [images], 1 if the markers are the ends of one snake, else 0.
      skipped: names of the images that are listed but cannot be read, each with the reason.
    """

    names: list[str]
    images: np.ndarray
    labels: np.ndarray
    skipped: list[str]


def read_folder(
    source: Path,
    size: int,
    difficulty: str,
    *,
    report: Callable[[str], None],
    workers: int | None = None,
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Reads all images of a size and difficulty, one block for each metadata file.

    Args:
      source: the folder pathfinder32 (or 64, 128, 256), or one that holds it, pathfinder/ with it
        inside, or lra_release/.
      size: side of the images in pixels.
      difficulty: one of PUBLISHED.
      report: called with a line of text for each block with skipped images, and once if there are
        folders of images without metadata.
      workers: number of processes; None means one for each core, 1 reads in this process.

    Yields:
      In the order of the numbers of the metadata files: names, images uint8 [k, size * size], and
      labels uint8 [k], as in Block.

    Raises:
      UserError: if there is no such folder; if metadata are malformed, naming file and line; if an
        image has another size or is not gray; and at the end, if more than 1 % were skipped.
    """
    metadata = find_metadata(source, size, difficulty)
    folder = metadata[0].parent.parent
    _report_without_metadata(folder, metadata, report)

    total = skipped = 0
    arguments = ((folder, path, size) for path in metadata)
    blocks = parallel.ordered_map(read_block, arguments, workers=workers)
    for path, block in zip(metadata, blocks, strict=True):
        count = len(block.names) + len(block.skipped)
        total += count
        skipped += len(block.skipped)
        if block.skipped:
            share = f"{len(block.skipped):,} of {count:,}"
            report(f"skipped {share} images of {path}: {_first_names(block.skipped)}")
        yield block.names, block.images, block.labels
    if skipped > _MAX_SKIPPED * total:
        raise UserError(
            f"{folder}: {skipped:,} of {total:,} images cannot be read, more than "
            f"{_MAX_SKIPPED:.0%}: partly unpacked? unpack or download it again"
        )


def find_metadata(source: Path, size: int, difficulty: str) -> list[Path]:
    """Finds the metadata files, ordered by number; arguments and errors are as in read_folder."""
    subfolder = PUBLISHED[difficulty]
    folders = (f"pathfinder{size}", f"pathfinder/pathfinder{size}")  # the second is S4's
    found = archives.find_in_release(source, folders, [f"{subfolder}/metadata"])
    metadata = _numbered(found / subfolder / "metadata", "*.npy")
    if not metadata:
        raise UserError(
            f"{found / subfolder}/metadata holds no files 0.npy and so on; unpack it again"
        )
    return metadata


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The paths in the folder whose names are numbers, in the order of the numbers."""
    paths = (path for path in folder.glob(pattern) if path.stem.isdecimal())
    return sorted(paths, key=lambda path: int(path.stem))


def _report_without_metadata(
    folder: Path, metadata: list[Path], report: Callable[[str], None]
) -> None:
    images = _numbered(folder / "imgs", "*")
    described = {path.stem for path in metadata}
    without = [f"imgs/{path.name}" for path in images if path.name not in described]
    if without:
        report(
            f"left out {len(without):,} of {len(images):,} folders of images that have no file in "
            f"{folder / 'metadata'}: {_first_names(without)}"
        )


def _first_names(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def read_block(folder: Path, metadata: Path, size: int) -> Block:
    """Reads the images that a metadata file lists.

    Args:
      folder: folder of the data set, such as pathfinder32/curv_contour_length_14.
      metadata: the metadata file.
      size: side of the images in pixels.

    Raises:
      UserError: as read_folder.
    """
    names, images, labels, skipped = [], [], [], []
    for line, columns in enumerate(_read_metadata(metadata), start=1):
        if len(columns) < _MIN_COLUMNS:
            raise UserError(
                f"{metadata}:{line}: expected {_MIN_COLUMNS} columns, got {len(columns)}; "
                "unpack or download it again"
            )
        name, label = "/".join(columns[_FILE]), columns[_LABEL]
        if label not in _LABELS:
            raise UserError(
                f"{metadata}:{line}: the label {label!r} is not 0 or 1; unpack or download it again"
            )
        try:
            image = _read_image(folder / name, size)
        except _UnreadableError as error:
            skipped.append(f"{name} ({error})")
            continue
        names.append(f"{folder.name}/{name}")
        images.append(image)
        labels.append(_LABELS[label])
    pixels = np.array(images, np.uint8).reshape(len(images), size**2)
    return Block(names, pixels, np.array(labels, np.uint8), skipped)


def _read_metadata(path: Path) -> list[list[str]]:
    """Reads the columns of each line of a metadata file."""
    content = path.read_bytes()
    try:
        if content.startswith(b"\x93NUMPY"):
            array = np.load(io.BytesIO(content), allow_pickle=False)
            if array.ndim != 2 or array.dtype.kind not in "SU":
                raise ValueError(f"an array of {array.dtype} {list(array.shape)}, not of text")
            rows = array.astype(str).tolist()
        else:
            rows = [line.split() for line in content.decode("utf-8-sig").splitlines()]
    except (EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not metadata ({reason}); unpack or download it again") from None
    if not rows:
        raise UserError(f"{path} is empty; unpack or download it again")
    return rows


class _UnreadableError(Exception):
    """Raised for an image that is skipped; the message says why."""


def _read_image(path: Path, size: int) -> np.ndarray:
    """Reads an image's gray levels, uint8 [size, size]; raises _UnreadableError or UserError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _UnreadableError("missing") from None
    if not content:
        raise _UnreadableError("empty file")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            mode, pixels = image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise _UnreadableError("not a PNG") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for damaged files
        raise _UnreadableError(" ".join(str(error).split())) from None
    if mode == "RGB" and (pixels == pixels[..., :1]).all():
        mode, pixels = "L", pixels[..., 0]
    if mode != "L" or pixels.shape != (size, size):
        height, width = pixels.shape[:2]
        raise UserError(
            f"{path} is an image of {width} x {height} in mode {mode}; "
            f"expected {size} x {size} gray levels (mode L)"
        )
    return pixels
