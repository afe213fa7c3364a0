"""Image: what does a photograph show? CIFAR-10 (Krizhevsky, 2009) in gray, pixel by pixel."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image as Picture

from skyformer_jax.data import archives, downloads
from skyformer_jax.data.builder import HeldOutBuilder, HeldOutConfig, Rows
from skyformer_jax.data.task import Task, shrink_images
from skyformer_jax.data.tokenizer import IDENTITY
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
    """Reads the batches of the binary version, in their order.

    Args:
      source: the folder cifar-10-batches-bin, its tar file of any compression, or a folder that
        holds either.
      sizes: examples of each split.

    Returns:
      For "train" and "test": images, uint8 [examples, 3, 32, 32], channels red, green, blue; and
      labels, uint8 [examples], 0..9.

    Raises:
      UserError: naming the file, if there is no such data set, its archive is damaged, a batch is
        missing or cut, or a label is not in 0..9.
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
    """The records of a batch, uint8 [examples, _RECORD]; raises UserError unless they are whole."""
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
    """Computes gray levels exactly as tf.image.rgb_to_grayscale does for uint8.

    That is, in float32: v / 255, the weighted sum from red to blue, times 255.5, cut to an integer.

    Args:
      rgb: uint8 [examples, 3, height, width].

    Returns:
      uint8 [examples, height * width], row by row.
    """
    examples, channels, height, width = rgb.shape
    planes = rgb.reshape(examples, channels, height * width)
    gray = np.empty((examples, height * width), np.uint8)
    for start in range(0, examples, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        red, green, blue = planes[chunk].astype(np.float32).swapaxes(0, 1) * np.float32(1 / 255)
        luma = _WEIGHTS[0] * red + _WEIGHTS[1] * green + _WEIGHTS[2] * blue
        gray[chunk] = luma * np.float32(255.5)
    return gray


class Image(HeldOutBuilder):
    """CIFAR-10 in gray, pixels row by row. Validation is 5,000 photographs held out of train."""

    URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    PUBLISHED = PUBLISHED
    TFDS_NAME = "cifar10"
    DESCRIPTION = "Photographs of 32 x 32 gray pixels (ITU-R 601 luma, 0..255), row by row."
    HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
    CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
    NUM_CLASSES = 10
    BUILDER_CONFIGS = (
        HeldOutConfig(
            name="cifar10",
            description="All 60,000 photographs.",
            sizes=tuple(SIZES.values()),
            num_validation=5_000,
        ),
    )

    def read(self, place: Path, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Reads train and test from the published folder or archive."""
        photographs = read_cifar10(place, sizes=sizes)
        return {split: (to_gray(rgb), labels) for split, (rgb, labels) in photographs.items()}

    def read_prepared(self, folder: Path, split: str, size: int) -> Rows:
        """Reads a split from a folder in which TFDS prepared cifar10."""
        rgb, labels = np.zeros((size, 3, _SIDE, _SIDE), np.uint8), np.zeros(size, np.uint8)
        skip = {"image": tfds.decode.SkipDecoding()}  # because TFDS would need OpenCV
        for i, example in enumerate(downloads.tfds_examples(folder, split, size, decoders=skip)):
            with Picture.open(io.BytesIO(example["image"])) as picture:
                rgb[i] = np.asarray(picture).transpose(2, 0, 1)
            labels[i] = example["label"]
        return to_gray(rgb), labels


IMAGE = Task(
    name="image",
    builder=Image,
    config="cifar10",
    source_config="cifar10",
    max_length=_SIDE**2,
    tokenizer=IDENTITY,  # every pixel is real, black ones included: nothing pads
    options={"shrink": 1},
    make_split=shrink_images,
)
