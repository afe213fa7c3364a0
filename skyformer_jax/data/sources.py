"""Where published data come from besides the user's own folders: TFDS, and the network."""

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from skyformer_jax.data import archives
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say


def download(
    url: str,
    published: archives.Published,
    data_dir: Path,
    dl_manager: tfds.download.DownloadManager,
) -> Path:
    """What lies in data_dir, or the original archive, checked against data/checksums.tsv.

    Raises:
      UserError: if the server cannot be reached, or sends something else.
    """
    place = archives.find(data_dir, published)
    if place is not None:
        say(f"reading {place}")
        return place
    parts = urlsplit(url)
    instead = (
        f"put {published.folder}/ or {published.archives[0]} into {data_dir}, or name their folder "
        "by --config.data.source (train.py) or --source (prepare)"
    )
    try:  # TFDS would try for minutes
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError as error:
        raise UserError(f"{url} cannot be reached ({error}): {instead}") from None
    say(f"downloading {url}")
    try:
        return Path(dl_manager.download(url))
    except Exception as error:  # of requests, TFDS and the disk
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the download of {url} failed: {reason}: {instead}") from None


def prepared_by_tfds(name: str, source: Path | None) -> Path | None:
    """A folder in which TFDS prepared its data set of that name, in the source or its default."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    place = source or Path(default).expanduser()
    found = [
        *place.glob(f"{name}/*/dataset_info.json"),
        *place.glob(f"{name}/*/*/dataset_info.json"),
    ]
    return max(found).parent if found else None


def _tfds_examples(folder: Path, split: str, size: int, **options: Any) -> Iterator[dict[str, Any]]:
    """The examples of a data set that TFDS prepared.

    Raises:
      UserError: if it cannot be read without TensorFlow, or is not of that size.
    """
    prepared = tfds.builder_from_directory(folder)
    found = prepared.info.splits[split].num_examples if split in prepared.info.splits else 0
    if found != size:
        raise UserError(f"{folder} has {found:,} examples in {split}, not {size:,}")
    try:
        data = prepared.as_data_source(split=split, **options)
    except NotImplementedError:
        raise UserError(
            f"{folder} is stored as {prepared.info.file_format.value}, which only TensorFlow "
            "reads; prepare it with file_format='array_record', or name the published files as the "
            "source"
        ) from None
    return (data[i] for i in range(size))


def read_tfds_reviews(folder: Path, split: str, size: int) -> tuple[list[bytes], np.ndarray]:
    """As text.read_reviews."""
    examples = list(_tfds_examples(folder, split, size))
    reviews = [example["text"] for example in examples]
    reviews = [review if isinstance(review, bytes) else review.encode() for review in reviews]
    return reviews, np.array([example["label"] for example in examples], np.uint8)


def read_tfds_photographs(folder: Path, split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """As image.read_cifar10."""
    rgb, labels = np.zeros((size, 3, 32, 32), np.uint8), np.zeros(size, np.uint8)
    skip = {"image": tfds.decode.SkipDecoding()}  # TFDS would need OpenCV
    for i, example in enumerate(_tfds_examples(folder, split, size, decoders=skip)):
        with Image.open(io.BytesIO(example["image"])) as picture:
            rgb[i] = np.asarray(picture).transpose(2, 0, 1)
        labels[i] = example["label"]
    return rgb, labels
