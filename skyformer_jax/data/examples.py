"""A split in host memory: all documents, unpadded, in one array of bytes."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from skyformer_jax.data.tokenizer import IDENTITY, Tokenizer
from skyformer_jax.errors import UserError

_IMAGES_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """A split: examples[i] is {"tokens": int32 array, unpadded, "label": int}.

    If an example is a pair of documents, its tokens are a tuple of two arrays.

    Attributes:
      values: uint8 [tokens], the stored values of all documents, one document after another.
      starts: int64 [examples * num_documents + 1], the index in values at which each document
        begins, and at last the length of values.
      label: int32 [examples].
      num_documents: number of documents of each example, 1 or 2.
      tokenizer: maps values to token ids.
      positions: int32 [tokens], the position of each value in its document, if values between them
        were left out; None if they are consecutive.
    """

    values: np.ndarray
    starts: np.ndarray
    label: np.ndarray
    num_documents: int = 1
    tokenizer: Tokenizer = IDENTITY
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.label)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns one example, as described in the class."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        first = i % len(self) * self.num_documents
        documents = tuple(
            self.tokenizer(self.values[self.starts[j] : self.starts[j + 1]])
            for j in range(first, first + self.num_documents)
        )
        return {
            "tokens": documents if self.num_documents > 1 else documents[0],
            "label": int(self.label[i]),
        }

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, int64 [examples, num_documents]."""
        return np.diff(self.starts).reshape(-1, self.num_documents)

    def select(self, keep: np.ndarray) -> "Examples":
        """Returns these examples without the values at which keep, bool [tokens], is False."""
        before = np.concatenate([[0], np.cumsum(keep)])
        return dataclasses.replace(
            self,
            values=self.values[keep],
            starts=before[self.starts],
            positions=None if self.positions is None else self.positions[keep],
        )

    def drop_below(self, threshold: int) -> "Examples":
        """Returns these examples without values below threshold; the others keep their places."""
        positions = self._place_in_document().astype(np.int32)
        return dataclasses.replace(self, positions=positions).select(self.values >= threshold)

    def cut(self, length: int) -> "Examples":
        """Returns these examples with each document cut to its first length tokens."""
        lengths = np.diff(self.starts)
        if not len(lengths) or lengths.max() <= length:
            return self
        return self.select(self._place_in_document() < length)

    def _place_in_document(self) -> np.ndarray:
        """Returns int64 [tokens]: the index of each stored value in its document."""
        return np.arange(len(self.values)) - np.repeat(self.starts[:-1], np.diff(self.starts))

    def shrunk(self, factor: int) -> "Examples":
        """Returns these square images, downsampled by a factor.

        Every pixel is the rounded mean of factor x factor pixels.

        Args:
          factor: a divisor of the images' side; 1 changes nothing.

        Raises:
          UserError: if the images are not square, or the factor does not divide their side.
        """
        if factor == 1:
            return self
        side = math.isqrt(int(self.starts[1]))
        if side**2 != self.starts[1]:
            raise UserError(f"data.shrink needs square images; these have {self.starts[1]} pixels")
        if factor < 1 or side % factor:
            raise UserError(f"data.shrink must divide {side}, the images' side; got {factor}")
        small = side // factor
        values = np.empty((len(self), small, small), np.uint8)
        images = self.values.reshape(-1, small, factor, small, factor)
        # In blocks, because the means are float64, eight times as large as the images.
        for start in range(0, len(self), _IMAGES_AT_ONCE):
            block = slice(start, start + _IMAGES_AT_ONCE)
            values[block] = np.rint(images[block].mean(axis=(2, 4)))
        starts = np.arange(len(self) + 1, dtype=np.int64) * small**2
        return dataclasses.replace(self, values=values.ravel(), starts=starts)

    def followed_by(self, other: "Examples") -> "Examples":
        """Returns these examples followed by other's; num_documents and tokenizer must be equal."""
        return dataclasses.replace(
            self,
            values=np.concatenate([self.values, other.values]),
            starts=np.concatenate([self.starts, self.starts[-1] + other.starts[1:]]),
            label=np.concatenate([self.label, other.label]),
        )

    def checksum(self) -> str:
        """Computes a hash, 16 hexadecimal digits, of all stored values, labels and their order."""
        sha = hashlib.sha256()
        arrays = [self.values, self.starts.astype("<i8"), self.label.astype("<i4")]
        if self.positions is not None:
            arrays.append(self.positions.astype("<i4"))
        for array in arrays:
            sha.update(np.ascontiguousarray(array))
        return sha.hexdigest()[:16]
