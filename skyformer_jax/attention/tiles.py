"""What the tiled forms of the primitives share: how many rows a tile has, and loops over tiles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def tile_rows(q_length: int, kv_length: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Rows of a tile along query and along key."""
    long, short = tile
    if q_length < kv_length:
        return even_rows(q_length, short), even_rows(kv_length, long)
    return even_rows(q_length, long), even_rows(kv_length, short)


def even_rows(length: int, limit: int) -> int:
    """Rows of each of the fewest equal blocks that hold length rows, limit being the most."""
    num_blocks = max(1, -(-length // limit))
    rows = -(-length // num_blocks)
    return max(1, rows if num_blocks == 1 else -(-rows // 8) * 8)


def pad(array: jax.Array, rows: int, axis: int = 1) -> jax.Array:
    """Zeros after an axis, up to a multiple of rows."""
    missing = -array.shape[axis] % rows
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths) if missing else array


def loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carry after body(start, carry), ..., body(stop - 1, carry); a loop for several turns only.

    JAX can differentiate it backwards where start and stop are ints, not where they are traced.
    """
    if not (isinstance(start, int) and isinstance(stop, int)) or stop - start > 1:
        return jax.lax.fori_loop(start, stop, body, carry)
    return body(start, carry) if stop > start else carry
