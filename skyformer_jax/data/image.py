"""Image: what does a photograph show? CIFAR-10 (Krizhevsky, 2009) in gray, pixel by pixel."""

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from skyformer_jax.data import archives, tables
from skyformer_jax.data.builder import Rows
from skyformer_jax.data.held_out import HeldOutBuilder, HeldOutConfig
from skyformer_jax.data.task import Task, shrink_images
from skyformer_jax.data.tokenizer import IDENTITY
from skyformer_jax.errors import UserError

SIZES: Mapping[str, int] = {"train": 50_000, "test": 10_000}

_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
FORMS = (
    archives.Published(
        "cifar-10-batches-bin", ("test_batch.bin",), ("cifar-10-binary.tar.gz",), "*_batch*.bin"
    ),
    archives.Published(
        "cifar-10-batches-py", ("test_batch",), ("cifar-10-python.tar.gz",), "*_batch*"
    ),
)
_NAME = re.compile(r"((?:data_batch_[1-5]|test_batch)(\.bin)?)")
_NUM_CLASSES = 10
_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2  # a label, then the red, green and blue planes, row by row
_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R 601 luma
_CHUNK = 1024  # images


def read_cifar10(
    source: Path, *, sizes: Mapping[str, int] = SIZES
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the batches of the binary or of the Python version, in their order.

    Args:
      source: the folder cifar-10-batches-bin or cifar-10-batches-py, the tar file of either with
        any compression, or a folder that holds one of these.
      sizes: number of examples of each split.

    Returns:
      For "train" and "test": images, uint8 [examples, 3, 32, 32], channels red, green, blue; and
      labels, uint8 [examples], 0..9.

    Raises:
      UserError: if there is no such data set, its archive is damaged, a batch is missing, truncated
        or of another format, or a label is not in 0..9. The message names the file.
    """
    place = archives.locate(source, FORMS)
    batches = {}
    for match, content in archives.members(place, _NAME, "CIFAR-10's batches"):
        parse = _parse_binary if match[2] else _parse_pickle
        batch = parse(content, f"{place}: {match[0]}")
        if not np.array_equal(batches.setdefault(match[1], batch), batch):
            raise UserError(
                f"{place} holds two copies of {match[1]}, which differ: {match[0]} is the second; "
                "leave one there"
            )
    ending = "" if "test_batch" in batches and "test_batch.bin" not in batches else ".bin"
    splits = {}
    for split, size in sizes.items():
        names = [f"{name}{ending}" for name in _BATCHES[split]]
        missing = [name for name in names if name not in batches]
        if missing:
            raise UserError(
                f"{place} is incomplete: it lacks {', '.join(missing)}; unpack or download it again"
            )
        records = [batches.pop(name) for name in names]
        labels = np.concatenate([batch[:, 0] for batch in records])
        archives.check_count(place, len(labels), size, f"images in {split}")
        images = np.concatenate([batch[:, 1:] for batch in records])
        splits[split] = images.reshape(-1, 3, _SIDE, _SIDE), labels
    return splits


def _parse_binary(content: bytes, name: str) -> np.ndarray:
    """Parses a batch, uint8 [examples, _RECORD]; raises UserError unless all records are whole."""
    if len(content) % _RECORD:
        raise UserError(
            f"{name} has {len(content):,} bytes, not a multiple of {_RECORD:,}: "
            "incomplete, or not the binary version; unpack or download it again"
        )
    return _checked(np.frombuffer(content, np.uint8).reshape(-1, _RECORD), name)


def _checked(records: np.ndarray, name: str) -> np.ndarray:
    """Returns the records; raises UserError for a label that is not in 0..9."""
    wrong = np.flatnonzero(records[:, 0] >= _NUM_CLASSES)
    if wrong.size:
        raise UserError(
            f"{name}, record {wrong[0] + 1:,}: the label {records[wrong[0], 0]} is not one of "
            f"0 to {_NUM_CLASSES - 1}; unpack or download it again"
        )
    return records


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of arrays, numbers and strings, and never calls a harmful function.

    A pickle names the functions that create its objects. Any that a batch does not need is refused.
    """

    def find_class(self, module: str, name: str) -> object:
        """Returns the function or class to use for this name in a pickle."""
        maker = _MAKERS.get((module.replace("numpy._core", "numpy.core"), name))
        if maker is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return maker


# Keyed by the names in pickles of NumPy arrays. No function is imported by its name.
_MAKERS: Mapping[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: np.zeros(shape, code),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
}


def _parse_pickle(content: bytes, name: str) -> np.ndarray:
    """Parses a batch of the Python version to the same records as _parse_binary."""
    try:
        # Python 2 wrote the published batches: their keys are bytes. Later copies have str keys.
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {key if isinstance(key, bytes) else key.encode(): batch[key] for key in batch}
        pixels, labels = np.asarray(fields[b"data"]), np.asarray(fields[b"labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (labels.size, _RECORD - 1):
            raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}")
        if labels.dtype.kind not in "iu" or not ((labels >= 0) & (labels < 256)).all():
            raise ValueError(f"labels are {labels.dtype}")
    except Exception as error:  # a damaged pickle raises nearly any type
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            f"{name} is no batch of CIFAR-10's Python version, or not whole: {reason}"
        ) from None
    return _checked(np.column_stack([labels.astype(np.uint8), pixels]), name)


def to_gray(rgb: np.ndarray) -> np.ndarray:
    """Computes gray levels exactly as tf.image.rgb_to_grayscale does for uint8.

    In float32, each value is multiplied by 1 / 255, the weighted sum is taken in the order red,
    green, blue and multiplied by 255.5, and the result is truncated to an integer.

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
    FORMS = FORMS
    TFDS_NAME = "cifar10"
    TFDS_FEATURES = ("image", "label")
    COLUMNS = (("img", "image"), ("label",))
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

    def read_examples(self, place: Path, inputs: Sequence, labels: Sequence) -> Rows:
        """Reads a split from the image files and labels that TFDS or a table holds."""
        rgb = np.zeros((len(inputs), 3, _SIDE, _SIDE), np.uint8)
        for i, value in enumerate(inputs):
            file = value["bytes"] if isinstance(value, dict) else value  # as in the hub's tables
            try:
                with Picture.open(io.BytesIO(file)) as picture:
                    rgb[i] = np.asarray(picture).transpose(2, 0, 1)
            except (OSError, TypeError, ValueError) as error:
                raise UserError(
                    f"{place}, example {i + 1}: no image of {_SIDE} x {_SIDE} pixels ({error})"
                ) from None
        names = {str(label): label for label in range(_NUM_CLASSES)}
        return to_gray(rgb), tables.class_numbers(place, labels, names)


IMAGE = Task(
    name="image",
    builder=Image,
    config="cifar10",
    source_config="cifar10",
    max_length=_SIDE**2,
    tokenizer=IDENTITY,  # id 0 is a black pixel; no image is padded
    options={"shrink": 1},
    make_split=shrink_images,
)
