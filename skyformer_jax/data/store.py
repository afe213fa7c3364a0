"""Data sets on disk: a TFDS builder prepares each one once, and splits are read whole."""

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format

from skyformer_jax.data import archives
from skyformer_jax.data.builder import SOURCE_FILE, LraBuilder, document_features
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError
from skyformer_jax.files import check_name, expand, lock, unnamed_owners
from skyformer_jax.progress import say

_READ_AT_ONCE = 4096
_say_once = functools.cache(say)
# Texts of errors that are not due to damaged data.
_OF_MACHINE = ("Permission denied", "Too many open files", "Cannot allocate memory")


def make(builder: type[LraBuilder], config: str | Any, data_dir: str) -> LraBuilder:
    """Makes the builder of a data set in data_dir.

    Args:
      builder: class of the builder.
      config: name of one of the builder's configs, or another config object.
      data_dir: folder of all data sets.

    Raises:
      UserError: if the data set exists but its description cannot be read.
    """
    folder = expand(data_dir)
    check_name(folder.absolute())
    try:
        return builder(config=config, data_dir=str(folder), file_format="array_record")
    except (tfds.core.dataset_info.DatasetInfoFileError, json_format.ParseError) as error:
        place = folder / builder.name / getattr(config, "name", config)
        raise _damaged(place, f"dataset_info.json cannot be read: {error}") from None


def _damaged(place: Path, reason: str) -> UserError:
    reason = " ".join(reason.split())[:200]
    return UserError(
        f"the data set in {place} is damaged: {reason}; delete that folder to make it again"
    )


def _record(place: Path) -> dict[str, Any]:
    """Returns the record of what a data set was made from; raises UserError if it is unreadable."""
    try:
        return json.loads((place / SOURCE_FILE).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(place, f"{SOURCE_FILE}: {error}") from None


def prepare(builder: LraBuilder, source: str | None = None) -> None:
    """Prepares a data set unless it exists.

    If the process is killed, it leaves nothing that looks like a complete data set. If several
    processes prepare the same data set at once, one of them does it and the others wait.

    Args:
      builder: builder of the data set, from make.
      source: folder or archive with the published files; None generates or downloads.

    Raises:
      UserError: if the source is missing or malformed, or the data set exists but was made from
        another source.
    """
    builder.source = expand(source) if source else None
    place = Path(builder.data_dir)
    if place.is_dir():
        builder.clean_up()  # in case an earlier process was killed before it could
        if builder.source is not None:
            _check_same_source(place, builder)
        return
    if builder.source is not None:
        if not builder.source.exists():
            raise archives.NotHereError(
                f"{place} is not there, and the source {builder.source} does not exist either; "
                "name the folder that all data sets were moved to, or the source"
            )
        builder.source_files()  # raises before anything is written
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.dir={builder.data_dir_root} cannot be created as a folder ({error.strerror}); "
            "name another"
        ) from None
    with lock(place.parent / "lock", wait=True) as held:
        if place.is_dir():
            return
        for leftover in place.parent.glob("incomplete.*") if held else ():
            shutil.rmtree(leftover, ignore_errors=True)
        say(f"preparing {builder.info.full_name} in {builder.data_dir_root}")
        # TFDS prints that sizes are unknown, but standard output belongs to the caller.
        with contextlib.redirect_stdout(io.StringIO()), _without_tfds_bars(), unnamed_owners():
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(force_checksums_validation=True)
            )
        builder.clean_up()


def describe(builder: LraBuilder) -> dict[str, Any]:
    """Returns a prepared data set's name with version, its source's name, and the notes on it."""
    record = _record(Path(builder.data_dir))
    return {
        "name": builder.info.full_name,
        "source": Path(record["source"]).name,  # without the path, which is private
        "notes": record["notes"],
    }


def _check_same_source(place: Path, builder: LraBuilder) -> None:
    """Raises UserError if the data set was made from other files than those of the source.

    A source that no longer exists is not compared. If it is not the one that the data set was made
    from, a line says so.
    """
    record = _record(place)
    if not builder.source.exists():
        if Path(record["source"]).absolute() != builder.source.absolute():
            _say_once(
                f"{builder.source} does not exist; reading the data set in {place}, which was made "
                f"from {record['source']}"
            )
        return
    known = record["files"]
    files = builder.source_files()
    names = {path.name for path in files}
    if not builder.FORMS_AGREE and names != known.keys():
        raise UserError(
            f"the data set in {place} was made from {', '.join(sorted(known))}, and "
            f"{builder.source} holds {', '.join(sorted(names))}; name another data.dir, or delete "
            "that folder to make it again"
        )
    for path in filter(Path.exists, files):  # links may be broken by now
        if path.name in known and known[path.name] != archives.fingerprint(path):
            raise UserError(
                f"the data set in {place} was made from another {path.name} than {path}; "
                "name another data.dir, or delete that folder to make it again"
            )


@contextlib.contextmanager
def _without_tfds_bars() -> Iterator[None]:
    """Hides the progress bars of TFDS, because this package shows its own."""
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def load(builder: LraBuilder, split: str) -> Examples:
    """Reads a split of a prepared data set.

    Args:
      builder: builder of the data set, from make.
      split: "train", "validation" or "test".

    Raises:
      UserError: if the data set is not prepared, or one of its files is missing or damaged.
    """
    place = Path(builder.data_dir)
    if not place.is_dir():
        raise UserError(f"{place} is missing; prepare it by python -m skyformer_jax.prepare")
    names = document_features(builder.NUM_DOCUMENTS)
    values, lengths, labels = bytearray(), [], []
    try:
        if not builder.info.splits:  # another process prepared it after this builder was made
            builder.info.read_from_directory(place)
        size = builder.info.splits[split].num_examples
        source = builder.as_data_source(split=split)
        for start in range(0, size, _READ_AT_ONCE):
            for example in source.__getitems__(range(start, min(start + _READ_AT_ONCE, size))):
                for name in names:
                    values += example[name].data
                    lengths.append(len(example[name]))
                labels.append(example["label"])
    except Exception as error:  # TFDS, array_record and the parser of examples raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, MemoryError) or any(words in reason for words in _OF_MACHINE):
            raise UserError(f"the data set in {place} cannot be read: {reason}") from None
        raise _damaged(place, reason) from None
    if len(labels) != size or not size:
        raise UserError(f"split {split} in {place} is incomplete; delete that folder to remake it")
    return Examples(
        np.frombuffer(values, np.uint8),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        np.array(labels, np.int32),
        num_documents=builder.NUM_DOCUMENTS,
    )
