"""Examples held out for validation, chosen by what they are and not by where they stand."""

import hashlib
from collections.abc import Iterable

import numpy as np

from skyformer_jax.errors import UserError


def hold_out(
    contents: Iterable[bytes | np.ndarray], labels: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Chooses examples of every class by a hash of their content.

    The choice does not depend on the order; that of a smaller count is part of it. Examples of
    the same content and label stay on one side, but for those at the edge.

    Args:
      contents: of each example: bytes, or a contiguous array of uint8.
      labels: int [examples].
      count: how many; as many of each class as of the next, or one more of the first ones.
      seed: of the hash, not negative.

    Returns:
      bool [examples], true for the chosen.

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
    """A split of 80, 10 and 10 % in which each name has its place, whatever the others are.

    Args:
      name: of the example.
      seed: of the hash, not negative.

    Returns:
      "train", "validation" or "test".
    """
    tenth = content_hash(name.encode(), seed) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def content_hash(content: bytes | np.ndarray, seed: int = 0) -> int:
    """64 bits that are the same on every machine."""
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")
