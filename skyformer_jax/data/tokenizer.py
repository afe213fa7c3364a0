"""From stored bytes to token ids: the only place that says how far they are apart."""

import dataclasses
from typing import TypeVar

import numpy as np

Array = TypeVar("Array")  # of NumPy or of JAX


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps stored values to token ids: id = value + offset.

    Attributes:
      vocab_size: number of token ids, that of padding included.
      offset: 0 where the stored values are the ids; 1 where they are bytes and id 0 pads.
    """

    vocab_size: int
    offset: int = 0

    def __call__(self, values: Array) -> Array:
        """Token ids, int32, of an array of uint8 values; works on NumPy and on JAX arrays."""
        return values.astype(np.int32) + self.offset


BYTES = Tokenizer(257, offset=1)  # id 0 pads, byte b is b + 1
IDENTITY = Tokenizer(256)  # stored values are the ids; none of them stands for padding
