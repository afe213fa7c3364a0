"""The splits, and the choice of their examples by a hash of what these are, not by their order."""

import hashlib
from collections.abc import Iterable

import numpy as np

from skyformer_jax.errors import UserError

SPLITS = ("train", "validation", "test")


def hold_out(
    contents: Iterable[bytes | np.ndarray], labels: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Chooses examples of every class by a hash of their content.

    The choice does not depend on the order of the examples, and a larger count chooses what a
    smaller one does and more. Examples with the same content and label are all chosen or all left,
    except where the count ends among them.

    Args:
      contents: the content of each example: bytes, or a contiguous uint8 array.
      labels: int [examples].
      count: number of examples to choose. Every class gives the same number; if the classes do not
        divide the count, the first ones give one more.
      seed: seed of the hash, not negative.

    Returns:
      bool [examples], True for the chosen ones.

    Raises:
      UserError: if a class has fewer than its share.
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
    """Assigns an example to a split, of 80, 10 and 10 %, by its name alone.

    Args:
      name: name of the example.
      seed: seed of the hash, not negative.

    Returns:
      "train", "validation" or "test".
    """
    tenth = content_hash(name.encode(), seed) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def content_hash(content: bytes | np.ndarray, seed: int = 0) -> int:
    """A hash of 64 bits that is the same on every machine."""
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")
