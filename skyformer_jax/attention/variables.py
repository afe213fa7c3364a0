"""Descriptions of the arrays that a layer keeps for its attention, beside query, key and value."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class VariableSpec(NamedTuple):
    """One array argument of an attention function that a layer creates and keeps.

    Attributes:
      shape: shape of the array.
      init: (key, shape) -> the initial array.
      trained: True for a parameter. False for random numbers that stay as they were drawn; a layer
        leaves them out of a call that gets an rng to draw them anew.
    """

    shape: tuple[int, ...]
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    trained: bool
