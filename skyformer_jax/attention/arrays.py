"""Arrays that an attention needs beside query, key and value, described for the layers."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Array(NamedTuple):
    """A keyword argument of an attention function that a layer has to keep for it.

    Attributes:
      shape: of the array.
      init: (key, shape) -> the array at the start.
      trained: True for a parameter; False for something random that stays as it was drawn, and
        is left out of a call that is given an rng to draw it anew.
    """

    shape: tuple[int, ...]
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    trained: bool
