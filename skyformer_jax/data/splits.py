"""The splits, and the assignment of examples to them.

The assignment depends on a hash of an example's content or name, not on the order of the examples.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from skyformer_jax.errors import UserError

SPLITS = ("train", "validation", "test")


def hold_out(
    contents: Iterable[bytes | np.ndarray], labels: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Chooses examples of every class by a hash of their content.

    The choice does not depend on the order of the examples. A larger count chooses everything that
    a smaller one does, and more. Examples with the same content and label are either all chosen or
    all left, unless the count runs out among them.

    Args:
      contents: the content of each example: bytes, or a contiguous uint8 array.
      labels: int [examples].
      count: number of examples to choose, the same number from every class. If the number of
        classes does not divide count, the first classes give one more.
      seed: seed of the hash, not negative.

    Returns:
      bool [examples], True for the chosen ones.

    Raises:
      UserError: if a class has fewer examples than it must give.
    """
    hashes = np.array([content_hash(content, seed) for content in contents], np.uint64)
    classes = np.unique(labels)
    chosen = np.zeros(len(labels), bool)
    for i, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        share = count // len(classes) + (i < count % len(classes))
        if share > len(members):
            raise UserError(
                f"cannot hold out {count:,} of {len(labels):,} examples: class {label} has "
                f"{len(members):,} of the {share:,} needed; hold out fewer"
            )
        chosen[members[np.argsort(hashes[members], kind="stable")[:share]]] = True
    return chosen


def split_by_name(name: str, seed: int = 0) -> str:
    """Assigns an example to train (80 %), validation or test (10 % each), by its name alone.

    Args:
      name: the example's name, such as the path of its file in the data set.
      seed: seed of the hash, not negative.

    Returns:
      "train", "validation" or "test".
    """
    tenth = content_hash(name.encode(), seed) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def content_hash(content: bytes | np.ndarray, seed: int = 0) -> int:
    """Computes a 64-bit hash that is the same on every machine."""
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")
