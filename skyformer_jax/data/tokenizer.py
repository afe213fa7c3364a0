"""Conversion of stored bytes to token ids; only this module knows the offset between them."""

import dataclasses
from typing import TypeVar

import numpy as np

Array = TypeVar("Array")  # a NumPy or a JAX array


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps stored values to token ids: id = value + offset.

    Attributes:
      vocab_size: number of token ids, including that of padding.
      offset: 0 if the stored values are the ids; 1 if they are bytes, and id 0 is padding.
    """

    vocab_size: int
    offset: int = 0

    def __call__(self, values: Array) -> Array:
        """Returns the token ids, int32, of a NumPy or JAX array of uint8 values."""
        return values.astype(np.int32) + self.offset


BYTES = Tokenizer(257, offset=1)  # id 0 is padding, byte b has id b + 1
IDENTITY = Tokenizer(256)  # stored values are the ids; none of them is padding
