"""Text: IMDB reviews, positive or negative (Maas et al., 2011, aclImdb_v1).

Reviews are bytes, as the models read them; nothing is decoded.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from skyformer_jax.data import archives
from skyformer_jax.errors import UserError

PUBLISHED = archives.Published(
    "aclImdb", ("train/pos", "test/pos"), ("aclImdb_v1.tar.gz", "aclImdb.tar.gz")
)
SIZES: Mapping[str, int] = {"train": 25_000, "test": 25_000}

_NAME = re.compile(r"(train|test)/(neg|pos)/([0-9]+)_([0-9]+)\.txt")
_CLASSES = ("neg", "pos")
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}


def read_reviews(
    source: Path, *, report: Callable[[str], None], sizes: Mapping[str, int] = SIZES
) -> dict[str, tuple[list[bytes], np.ndarray]]:
    """Reads the labelled reviews, in an order that is the same for a folder and an archive.

    Args:
      source: the folder aclImdb or its tar file of any compression, or a folder with either.
      report: told, in a line, of texts that are not UTF-8.
      sizes: examples of each split, half of them of each class.

    Returns:
      For "train" and "test": the texts, without white space at their ends, first all negative
      ones, then all positive, each by their number; and labels, uint8 [examples], 1 for positive.

    Raises:
      UserError: naming the file, if there is no such data set, its archive is damaged, a review
        is missing or empty, or the rating in a file's name is not one of its class.
    """
    place = archives.locate(source, PUBLISHED)
    found: dict[str, list[tuple[int, int, int, bytes]]] = {split: [] for split in sizes}
    for match, content in archives.members(place, PUBLISHED, _NAME):
        split, name, number, rating = match.groups()
        if int(rating) not in _RATINGS[name]:
            ratings = _RATINGS[name]
            raise UserError(
                f"{place}: {match[0]} has rating {rating}, but those of {name} are "
                f"{ratings[0]} to {ratings[-1]}; unpack or download it again"
            )
        text = content.strip()
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
        foreign = len(texts) - sum(map(is_utf8, texts))
        if foreign:
            report(
                f"{place}: {foreign:,} of {len(texts):,} reviews of {split} are not UTF-8; "
                "their bytes are kept"
            )
        splits[split] = texts, labels
    return splits


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are valid UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
