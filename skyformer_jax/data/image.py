"""Image: CIFAR-10 (Krizhevsky, 2009) from its binary version, and its gray levels."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from skyformer_jax.data import archives
from skyformer_jax.errors import UserError

SIZES: Mapping[str, int] = {"train": 50_000, "test": 10_000}

_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
PUBLISHED = archives.Published(
    "cifar-10-batches-bin", ("test_batch.bin",), ("cifar-10-binary.tar.gz",)
)
_NAME = re.compile(r"(data_batch_[1-5]|test_batch)\.bin")
_NUM_CLASSES = 10
_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2  # a label, then the red, green and blue planes, row by row
_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R 601 luma
_CHUNK = 1024  # images


def read_cifar10(
    source: Path, *, sizes: Mapping[str, int] = SIZES
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the binary version's batches, in their order.

    Args:
      source: the folder cifar-10-batches-bin or its tar file of any compression, or a folder with
        either.
      sizes: examples of each split.

    Returns:
      For "train" and "test": images, uint8 [examples, 3, 32, 32], channels red, green, blue; and
      labels, uint8 [examples], 0..9.

    Raises:
      UserError: naming the file, if there is no such data set, its archive is damaged, a batch is
        missing or cut, or a label is none.
    """
    place = archives.locate(source, PUBLISHED)
    batches = {
        match[0]: _parse(content, f"{place}: {match[0]}")
        for match, content in archives.members(place, PUBLISHED, _NAME)
    }
    splits = {}
    for split, size in sizes.items():
        missing = [name for name in _FILES[split] if name not in batches]
        if missing:
            raise UserError(
                f"{place} is incomplete: it lacks {', '.join(missing)}; unpack or download it again"
            )
        records = [batches.pop(name) for name in _FILES[split]]
        labels = np.concatenate([batch[:, 0] for batch in records])
        archives.check_count(place, len(labels), size, f"images in {split}")
        images = np.concatenate([batch[:, 1:] for batch in records])
        splits[split] = images.reshape(-1, 3, _SIDE, _SIDE), labels
    return splits


def _parse(content: bytes, name: str) -> np.ndarray:
    """The records of a batch, uint8 [examples, _RECORD]; UserError unless they are whole."""
    if len(content) % _RECORD:
        raise UserError(
            f"{name} has {len(content):,} bytes, not a multiple of {_RECORD:,}: "
            "incomplete, or not the binary version; unpack or download it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 0] >= _NUM_CLASSES)
    if wrong.size:
        raise UserError(
            f"{name}, record {wrong[0] + 1:,}: the label {records[wrong[0], 0]} is not one of "
            f"0 to {_NUM_CLASSES - 1}; unpack or download it again"
        )
    return records


def to_gray(rgb: np.ndarray) -> np.ndarray:
    """Gray levels, exactly as tf.image.rgb_to_grayscale makes them of uint8.

    That is in float32: v / 255, the weighted sum from red to blue, times 255.5, cut to an integer.

    Args:
      rgb: uint8 [examples, 3, height, width].

    Returns:
      uint8 [examples, height * width], row by row.
    """
    examples, channels, height, width = rgb.shape
    planes = rgb.reshape(examples, channels, height * width)
    gray = np.empty((examples, height * width), np.uint8)
    for start in range(0, examples, _CHUNK):
        part = slice(start, start + _CHUNK)
        red, green, blue = planes[part].astype(np.float32).swapaxes(0, 1) * np.float32(1 / 255)
        luma = _WEIGHTS[0] * red + _WEIGHTS[1] * green + _WEIGHTS[2] * blue
        gray[part] = luma * np.float32(255.5)
    return gray
