"""Text: is a film review of IMDB positive or negative? (Maas et al., 2011, aclImdb_v1).

Reviews are bytes, as the models read them; nothing is decoded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from skyformer_jax.data import archives, tables
from skyformer_jax.data.builder import Rows
from skyformer_jax.data.examples import Examples
from skyformer_jax.data.held_out import HeldOutBuilder, HeldOutConfig
from skyformer_jax.data.task import DOCUMENT_LENGTH, LoadStored, Task, cut_documents
from skyformer_jax.data.tokenizer import BYTES
from skyformer_jax.errors import UserError

FORMS = (
    archives.Published(
        "aclImdb", ("train/pos", "test/pos"), ("aclImdb_v1.tar.gz", "aclImdb.tar.gz")
    ),
)
SIZES: Mapping[str, int] = {"train": 25_000, "test": 25_000}

_NAME = re.compile(r"(train|test)/(neg|pos)/([0-9]+)_([0-9]+)\.txt")
_CLASSES = ("neg", "pos")
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}
_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}  # in tables


def read_reviews(
    source: Path, *, report: Callable[[str], None], sizes: Mapping[str, int] = SIZES
) -> dict[str, tuple[list[bytes], np.ndarray]]:
    """Reads the labelled reviews, in an order that is the same for a folder and an archive.

    Args:
      source: the folder aclImdb, its tar file with any compression, or a folder that holds either.
      report: called with a line of text if some reviews are not UTF-8.
      sizes: number of examples of each split, half of them of each class.

    Returns:
      For "train" and "test": the texts, stripped of white space at both ends, first all negative
      and then all positive ones, each in the order of their numbers; and labels, uint8 [examples],
      1 for positive.

    Raises:
      UserError: if there is no such data set, its archive is damaged, a review is missing or empty,
        or the rating in a file's name does not belong to its class. The message names the file.
    """
    place = archives.locate(source, FORMS)
    found: dict[str, list[tuple[int, int, int, bytes]]] = {split: [] for split in sizes}
    for match, content in archives.members(place, _NAME, "IMDB's reviews"):
        split, name, number, rating = match.groups()
        if int(rating) not in _RATINGS[name]:
            ratings = _RATINGS[name]
            raise UserError(
                f"{place}: {match[0]} has rating {rating}, but those of {name} are "
                f"{ratings[0]} to {ratings[-1]}; unpack or download it again"
            )
        text = _stripped(content)
        if not text:
            raise UserError(f"{place}: {match[0]} is empty; unpack or download it again")
        found[split].append((_CLASSES.index(name), int(number), int(rating), text))

    splits = {}
    for split, size in sizes.items():
        rows = sorted(found.pop(split))
        labels = np.array([row[0] for row in rows], np.uint8)
        for label, name in enumerate(_CLASSES):
            count = np.count_nonzero(labels == label)
            archives.check_count(place, count, size // 2, f"reviews in {split}/{name}")
        texts = [row[-1] for row in rows]
        foreign = len(texts) - sum(map(archives.is_utf8, texts))
        if foreign:
            report(
                f"{place}: {foreign:,} of {len(texts):,} reviews of {split} are not UTF-8; "
                "their bytes are kept"
            )
        splits[split] = texts, labels
    return splits


def _stripped(text: bytes) -> bytes:
    """Strips a review of a byte-order mark, and of white space at both ends."""
    return text.removeprefix(archives.BYTE_ORDER_MARK).strip()


class Text(HeldOutBuilder):
    """IMDB reviews as bytes; label 1 is positive. Validation is 2,500 reviews held out of train."""

    URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
    FORMS = FORMS
    TFDS_NAME = "imdb_reviews"
    TFDS_FEATURES = ("text", "label")
    COLUMNS = (("text", "review"), ("label", "sentiment"))
    HOMEPAGE = "https://ai.stanford.edu/~amaas/data/sentiment/"
    DESCRIPTION = "Movie reviews as bytes, classified as negative (0) or positive (1)."
    CITATION = "Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011"
    NUM_CLASSES = 2
    BUILDER_CONFIGS = (
        HeldOutConfig(
            name="imdb",
            description="All 50,000 labelled reviews, whole.",
            sizes=tuple(SIZES.values()),
            num_validation=2_500,
        ),
    )

    def read(self, place: Path, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Reads train and test from the published folder or archive."""
        reviews = read_reviews(place, sizes=sizes, report=self.report)
        return {split: (_as_arrays(texts), labels) for split, (texts, labels) in reviews.items()}

    def read_examples(self, place: Path, inputs: Sequence, labels: Sequence) -> Rows:
        """Reads a split from the texts and labels that TFDS or a table holds."""
        texts = [_stripped(tables.as_bytes(value) or b"") for value in inputs]
        if not all(texts):
            raise UserError(
                f"{place}, example {texts.index(b'') + 1}: the review is empty, or no text"
            )
        numbers = tables.class_numbers(place, labels, _LABELS)
        for label, name in enumerate(_CLASSES):
            count = np.count_nonzero(numbers == label)
            archives.check_count(place, count, len(texts) // 2, f"reviews that are {name}")
        return _as_arrays(texts), numbers


def _as_arrays(texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(text, np.uint8) for text in texts]


def _make_split(load: LoadStored, split: str, length: int, validate_on_test: bool) -> Examples:
    """Returns a split with each review cut to its first length bytes.

    With validate_on_test, as in the published code, nothing is held out of train, and the
    validation split is the test split.
    """
    if not validate_on_test:
        return cut_documents(load, split, length)
    if split == "train":
        return load("train").followed_by(load("validation")).cut(length)
    return cut_documents(load, "test", length)


TEXT = Task(
    name="text",
    builder=Text,
    config="imdb",
    source_config="imdb",
    max_length=DOCUMENT_LENGTH,
    tokenizer=BYTES,
    options={"length": DOCUMENT_LENGTH, "validate_on_test": False},
    make_split=_make_split,
)
