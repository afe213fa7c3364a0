"""A classification task of the user's own, on texts or on gray images that are read from tables.

The source is a folder with a file for train, one for test and, optionally, one for validation; see
skyformer_jax.data.tables for the formats. The task's definition is in the config, a run's
config.json keeps it, and the data set is stored in data_dir beside those of the other tasks.
"""

import hashlib
import json
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from skyformer_jax.data import archives, tables
from skyformer_jax.data.builder import LraBuilder, Shard, shard_of_documents
from skyformer_jax.data.splits import SPLITS, hold_out
from skyformer_jax.data.task import Task, cut_documents, shrink_images
from skyformer_jax.data.tokenizer import BYTES, IDENTITY
from skyformer_jax.errors import UserError, one_of

INPUTS = ("text", "pixels")
FIELDS = ("inputs", "classes", "max_length", "num_documents")  # fields of a definition
_NAME = re.compile("[a-z][a-z0-9_]*")
_HELD_OUT = 0.1  # share of train held out if there is no validation file

Classes = int | Sequence[str]
Split = tuple[list[tuple[np.ndarray, ...]], np.ndarray]  # the documents of each example; the labels


def make_task(
    name: str, *, inputs: str, classes: Classes, max_length: int, num_documents: int = 1
) -> Task:
    """Defines a task.

    Args:
      name: the task's name: lower-case letters, digits and underscores, the first one a letter.
      inputs: "text", whose tokens are bytes; or "pixels", whose tokens are gray levels 0..255, row
        by row.
      classes: the number of classes, if the labels are 0, 1 and so on; or else all labels.
      max_length: the number of bytes that are read of each text, or of pixels of an image.
      num_documents: number of texts or images of each example: 1, or 2 for a task on pairs.

    Raises:
      UserError: if the definition is invalid.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"a task's name is lower-case letters, digits and underscores; got {name!r}"
        )
    one_of(f"inputs of task {name},", inputs, INPUTS)
    classes = _as_stored(classes)
    labels = _labels(name, classes)
    if num_documents not in (1, 2):
        raise UserError(f"num_documents of task {name} must be 1 or 2; got {num_documents}")
    if not isinstance(max_length, numbers.Integral) or max_length < 1:
        raise UserError(
            f"max_length of task {name} must be a whole number, at least 1; got {max_length!r}"
        )
    max_length = int(max_length)
    definition = {
        "inputs": inputs,
        "classes": classes,
        "max_length": max_length,
        "num_documents": num_documents,
    }
    builder = _builder(name, inputs, labels, num_documents)
    (config,) = builder.BUILDER_CONFIGS
    return Task(
        name=name,
        builder=builder,
        config=config.name,
        source_config=config.name,
        max_length=max_length,
        tokenizer=BYTES if inputs == "text" else IDENTITY,
        options={"length": max_length} if inputs == "text" else {"shrink": 1},
        make_split=cut_documents if inputs == "text" else shrink_images,
        definition=definition,
    )


def _as_stored(classes: Any) -> Any:
    """Returns classes as a definition holds them: any integer as an int, a sequence as a tuple."""
    if isinstance(classes, numbers.Integral):
        return int(classes)
    return tuple(classes) if isinstance(classes, Iterable) and type(classes) is not str else classes


def _labels(name: str, classes: Classes) -> tuple[str, ...]:
    """Returns the labels as they are written in the files; raises UserError if they are invalid."""
    labels = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
    texts = isinstance(labels, tuple) and all(isinstance(label, str) for label in labels)
    if not texts or len(labels) < 2 or len(set(labels)) != len(labels):
        raise UserError(
            f"classes of task {name} must be a number or different texts, 2 or more; got "
            f"{classes!r}"
        )
    return labels


def _builder(
    task_name: str, inputs: str, labels: tuple[str, ...], num_documents: int
) -> type[LraBuilder]:
    """Makes the TFDS builder of a task. Its config's name depends on all that decides the data."""
    meaning = json.dumps([inputs, labels, num_documents])
    digest = hashlib.sha256(meaning.encode()).hexdigest()[:8]

    class Own(OwnBuilder, skip_registration=True):
        name = task_name
        NUM_CLASSES = len(labels)
        NUM_DOCUMENTS = num_documents
        INPUTS = inputs
        LABELS = labels
        BUILDER_CONFIGS = (
            tfds.core.BuilderConfig(name=f"{inputs}-{digest}", description="A task of one's own."),
        )

    return Own


class OwnBuilder(LraBuilder, skip_registration=True):
    """A data set of the user's own; the label is the index of the class in LABELS."""

    DESCRIPTION = "A classification task of one's own."
    HOMEPAGE = ""
    CITATION = ""
    FORMS_AGREE = False  # train differs if there is a table for validation
    INPUTS: str
    LABELS: tuple[str, ...]

    def source_files(self) -> list[Path]:
        """Returns the files of all splits."""
        return [path for paths in self._find().values() for path in paths]

    def _find(self) -> dict[str, list[Path]]:
        if self.source is None:
            raise UserError(
                f"task {self.name} is not prepared in {self.data_dir_root}: name the folder of its "
                "files by --config.data.source (train.py) or --source (prepare), or the data_dir "
                "that holds it"
            )
        found = tables.find(self.source)
        missing = [split for split in ("train", "test") if split not in found]
        if missing:
            raise archives.NotHereError(
                f"{self.source} does not hold {' and '.join(missing)} of task {self.name}; "
                f"{archives.holding(self.source)}it "
                "must hold train and test, and may hold validation, each as one of "
                f"{', '.join(tables.READERS)}"
            )
        return found

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Reads the tables, and holds validation out of train if it has no table."""
        del dl_manager
        rows = {split: self._read(paths) for split, paths in self._find().items()}
        if self.INPUTS == "pixels":
            self._check_sizes(rows)
        if "validation" not in rows:
            documents, labels = rows["train"]
            held_out = _held_out(documents, labels)
            for split, chosen in (("train", ~held_out), ("validation", held_out)):
                rows[split] = [documents[i] for i in np.flatnonzero(chosen)], labels[chosen]
        return {
            split: [shard_of_documents(*rows[split], f"storing {self.name} {split}")]
            for split in SPLITS
        }

    def _check_sizes(self, rows: Mapping[str, Split]) -> None:
        """Raises a UserError if the images of a split differ in size from those of train."""
        pixels = {split: list(map(len, documents[0])) for split, (documents, _) in rows.items()}
        for split, found in pixels.items():
            if found != pixels["train"]:
                raise UserError(
                    f"{self.source}: images of {split} have {found} pixels, and those of train "
                    f"{pixels['train']}; all must have one size"
                )

    def _read(self, paths: Sequence[Path]) -> Split:
        """Reads the examples of a split, in the order of its files."""
        place, parse = paths[0], _PARSERS[self.INPUTS]
        names = [self.INPUTS]
        if self.NUM_DOCUMENTS > 1:
            names = [f"{self.INPUTS}_{i + 1}" for i in range(self.NUM_DOCUMENTS)]
        *columns, labels = tables.read(paths, [*([name] for name in names), ["label"]])
        documents = [
            parse(place, name, column) for name, column in zip(names, columns, strict=True)
        ]
        numbers = {label: i for i, label in enumerate(self.LABELS)}
        return list(zip(*documents, strict=True)), tables.class_numbers(place, labels, numbers)


def _parse_text(place: Path, name: str, column: tables.Column) -> list[np.ndarray]:
    texts = []
    for i, value in enumerate(column):
        text = tables.as_bytes(value)
        if not text:
            what = "empty" if text == b"" else f"no text, but {value!r:.40}"
            raise UserError(f"{place}, example {i + 1}: {name} is {what}")
        texts.append(np.frombuffer(text, np.uint8))
    return texts


def _parse_pixels(place: Path, name: str, column: tables.Column) -> list[np.ndarray]:
    try:
        images = np.asarray(column)
    except ValueError:
        raise UserError(f"{place}: {name} are images of different sizes; give all one") from None
    if images.dtype != np.uint8 or images.ndim not in (2, 3) or not images.size:
        raise UserError(
            f"{place}: {name} must be gray levels 0..255, uint8 [examples, height, width] or "
            f"[examples, pixels]; got {images.dtype} {list(images.shape)}"
        )
    return list(images.reshape(len(images), -1))


_PARSERS: Mapping[str, Callable[[Path, str, tables.Column], list[np.ndarray]]] = {
    "text": _parse_text,
    "pixels": _parse_pixels,
}


def _held_out(documents: Sequence[tuple[np.ndarray, ...]], labels: np.ndarray) -> np.ndarray:
    """Chooses a tenth of each class by hashes of the contents; returns bool [examples]."""
    contents = [b"\0".join(map(bytes, example)) for example in documents]
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(_HELD_OUT * len(members))
        chosen[members] = hold_out([contents[i] for i in members], labels[members], count, seed=0)
    if not chosen.any() or chosen.all():
        raise UserError(
            f"{len(labels)} examples are too few to hold a tenth of each class out for validation; "
            "add a file for validation"
        )
    return chosen


def check_definition(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Checks config.own_task, which may come from JSON, and returns it as arguments of make_task.

    Raises:
      UserError: if a field is unknown or missing.
    """
    for field in definition:
        one_of("field own_task.", field, FIELDS)
    missing = [field for field in FIELDS if field not in definition]
    if missing:
        raise UserError(f"config.own_task lacks {', '.join(missing)}; tasks.define makes it")
    classes = definition["classes"]
    return {**definition, "classes": _as_stored(classes)}
