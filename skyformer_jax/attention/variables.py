"""Descriptions of the arrays that a layer keeps for its attention, such as projections."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class VariableSpec(NamedTuple):
    """Describes an array argument of an attention function that a layer creates and keeps.

    Attributes:
      shape: shape of the array.
      init: returns the initial array, given a key and the shape.
      trained: True for a parameter. False for random numbers that stay as drawn; a layer omits
        them from a call that gets an rng to redraw them.
    """

    shape: tuple[int, ...]
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    trained: bool
