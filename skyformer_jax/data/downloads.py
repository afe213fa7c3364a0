"""Downloads published data, and reads data sets that TFDS prepared."""

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tensorflow_datasets as tfds

from skyformer_jax.data import archives
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say


def download(
    url: str,
    forms: Sequence[archives.Published],
    data_dir: Path,
    dl_manager: tfds.download.DownloadManager,
) -> Path:
    """Finds the published folder or archive in data_dir, or else downloads the archive.

    Args:
      url: address of the archive, whose size and SHA-256 are in data/checksums.tsv.
      forms: the forms in which the data set is published; the archive at url is of the first.
      data_dir: folder of all data sets.
      dl_manager: the download manager of TFDS, which also checks size and SHA-256.

    Raises:
      UserError: if the server cannot be reached, or sends something else.
    """
    place = archives.find(data_dir, forms)
    if place is not None:
        say(f"reading {place}")
        return place
    parts = urlsplit(url)
    instead = (
        f"put {forms[0].folder}/ or {forms[0].archives[0]} into {data_dir}, or name their folder "
        "by --config.data.source (train.py) or --source (prepare)"
    )
    try:  # before TFDS, which would try for minutes
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError as error:
        raise UserError(f"{url} cannot be reached ({error}): {instead}") from None
    say(f"downloading {url}")
    try:
        return Path(dl_manager.download(url))
    except Exception as error:  # requests, TFDS and the disk raise many types
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the download of {url} failed: {reason}: {instead}") from None


def prepared_by_tfds(name: str, source: Path | None) -> Path | None:
    """Finds a data set that TFDS prepared.

    Args:
      name: name of the data set in TFDS.
      source: folder to look in; None means the default folder of TFDS.

    Returns:
      The folder of its latest version, or None if there is none.
    """
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    place = source or Path(os.path.expanduser(default))  # unchanged if there is no home folder
    found = [
        *place.glob(f"{name}/*/dataset_info.json"),
        *place.glob(f"{name}/*/*/dataset_info.json"),
    ]
    return max(found).parent if found else None


def tfds_examples(
    folder: Path, split: str, size: int, inputs: str, labels: str
) -> Iterator[tuple[Any, Any]]:
    """Returns an iterator over the inputs and labels of a data set that TFDS prepared.

    Args:
      folder: folder of the data set, from prepared_by_tfds.
      split: name of the split in TFDS.
      size: number of examples that the split must have.
      inputs: name of the input feature. Inputs are not decoded: an image is the content of a file.
      labels: name of the label feature.

    Raises:
      UserError: if the data set cannot be read without TensorFlow, or the split has another size.
    """
    prepared = tfds.builder_from_directory(folder)
    found = prepared.info.splits[split].num_examples if split in prepared.info.splits else 0
    if found != size:
        raise UserError(f"{folder} has {found:,} examples in {split}, not {size:,}")
    try:
        # Without decoding, because TFDS would need OpenCV for images.
        data = prepared.as_data_source(split, decoders={inputs: tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise UserError(
            f"{folder} is stored as {prepared.info.file_format.value}, which only TensorFlow "
            "reads; prepare it with file_format='array_record', or name the published files as the "
            "source"
        ) from None
    return ((data[i][inputs], data[i][labels]) for i in range(size))
