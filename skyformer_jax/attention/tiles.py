"""What the tiled forms of the primitives share: blocks of rows, and loops over them.

Arrays are [batch, length, ...]; their blocks have the same axes and some of the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def tile_rows(q_length: int, kv_length: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Rows of a tile along query and along key."""
    long, short = tile
    if q_length < kv_length:
        return _rows(q_length, short), _rows(kv_length, long)
    return _rows(q_length, long), _rows(kv_length, short)


def _rows(length: int, limit: int) -> int:
    """Rows of each of the fewest equal blocks that hold length rows, limit being the most."""
    num_blocks = max(1, -(-length // limit))
    rows = -(-length // num_blocks)
    return max(1, rows if num_blocks == 1 else -(-rows // 8) * 8)


def pad(array: jax.Array, rows: int) -> jax.Array:
    """Zeros after axis 1, up to a multiple of rows."""
    missing = -array.shape[1] % rows
    widths = [(0, missing if axis == 1 else 0) for axis in range(array.ndim)]
    return jnp.pad(array, widths) if missing else array


def loop(count: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carry after body(0, carry), body(1, ...), ...; a loop only for more than one turn.

    JAX can differentiate it backwards where count is an int, not where it is traced.
    """
    if not isinstance(count, int) or count > 1:
        return jax.lax.fori_loop(0, count, body, carry)
    return body(0, carry) if count else carry
