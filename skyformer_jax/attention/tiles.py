"""The division of scores into tiles and loops over them, for the implementations in plain JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import reshaped


def tile_rows(q_length: int, kv_length: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Returns the length of a tile along query and along key.

    `tile` is the maximum along the longer and along the shorter of the two.
    """
    long, short = tile
    if q_length < kv_length:
        return even_rows(q_length, short), even_rows(kv_length, long)
    return even_rows(q_length, long), even_rows(kv_length, short)


def even_rows(length: int, limit: int) -> int:
    """Returns the rows per block for the fewest equal blocks of at most `limit` rows.

    If there are several blocks, it is rounded up to a multiple of 8.
    """
    num_blocks = max(1, -(-length // limit))
    rows = -(-length // num_blocks)
    return max(1, rows if num_blocks == 1 else -(-rows // 8) * 8)


def pad(array: jax.Array, rows: int, axis: int = 1) -> jax.Array:
    """Pads an axis with zeros at its end, to a multiple of rows."""
    missing = -array.shape[axis] % rows
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths) if missing else array


def loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Returns carry after body(start, carry), ..., body(stop - 1, carry).

    It uses fori_loop unless start and stop are ints and there is at most one iteration. JAX's
    reverse mode can differentiate it if start and stop are ints, but not if they are traced.
    """
    if not (isinstance(start, int) and isinstance(stop, int)) or stop - start > 1:
        return jax.lax.fori_loop(start, stop, body, carry)
    return body(start, carry) if stop > start else carry


class Tiles(NamedTuple):
    """How the scores are divided into tiles.

    Attributes:
      group: number of query heads that share one head of key and value.
      query_rows: queries per tile, for each head of a group.
      key_rows: keys per tile.
      query_blocks: number of blocks of queries.
      key_blocks: number of blocks of keys.
      keys_long: whether a tile is longer along the keys.
      keys_of: returns (start, stop), the range of key blocks that a query block attends to, given
        the index of the query block.
      queries_of: returns (start, stop), the range of query blocks that attend to a key block, given
        the index of the key block.
      terms: returns which scores of a tile count, given its two indices: bool [batch or 1, kv_heads
        or 1, group or 1, query_rows or 1, key_rows or 1], or None if all count.
    """

    group: int
    query_rows: int
    key_rows: int
    query_blocks: int
    key_blocks: int
    keys_long: bool
    keys_of: Callable[[Any], tuple[Any, Any]]
    queries_of: Callable[[Any], tuple[Any, Any]]
    terms: Callable[[Any, Any], jax.Array | None]


def causal_keys(i: Any, query_rows: int, key_rows: int, num_keys: int) -> jax.Array:
    """Returns how many of num_keys key blocks causal query block i attends to."""
    return jnp.minimum(num_keys, -(-((i + 1) * query_rows) // key_rows))


def divide(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    tile: tuple[int, int],
    is_causal: bool,
    skips: bool,
    keys_long: bool = False,
) -> Tiles:
    """Divides the scores of softmax attention; see softmax_tiles.tiled_value for the arguments.

    keys_long decides the orientation of a tile if a group has as many queries, over all its heads,
    as there are keys.
    """
    q_length, kv_length, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    if group * q_length != kv_length:
        keys_long = group * q_length < kv_length
    query_limit, key_limit = tile[::-1] if keys_long else tile
    query_rows = even_rows(q_length, max(1, query_limit // group))
    key_rows = even_rows(kv_length, key_limit)
    num_queries, num_keys = -(-q_length // query_rows), -(-kv_length // key_rows)
    skips = skips and is_causal and (num_queries > 1 or num_keys > 1)

    def keys_of(i: Any) -> tuple[Any, Any]:
        return 0, causal_keys(i, query_rows, key_rows, num_keys) if skips else num_keys

    def queries_of(j: Any) -> tuple[Any, Any]:
        start = j * key_rows // query_rows
        return jnp.minimum(num_queries, start) if skips else 0, num_queries

    return Tiles(
        group,
        query_rows,
        key_rows,
        num_queries,
        num_keys,
        keys_long,
        keys_of,
        queries_of,
        _terms(mask, kv_length, key.shape[2], group, (query_rows, key_rows), is_causal),
    )


def _terms(
    mask: jax.Array | None,
    kv_length: int,
    kv_heads: int,
    group: int,
    rows: tuple[int, int],
    is_causal: bool,
) -> Callable[[Any, Any], jax.Array | None]:
    """The attribute `terms` of Tiles; rows is the length of a tile along query and along key."""
    if mask is not None:
        heads = (1, 1) if mask.shape[1] == 1 else (kv_heads, group)
        shape = (mask.shape[0], *heads, *mask.shape[2:])
        mask = reshaped(mask, shape, lambda spec: (*spec[:2], None, *spec[2:]))
        for axis in (3, 4):
            mask = mask if mask.shape[axis] == 1 else pad(mask, rows[axis - 3], axis)

    def of_tile(i: Any, j: Any) -> jax.Array | None:
        terms = mask
        if terms is not None:
            for axis, index in ((3, i), (4, j)):
                if terms.shape[axis] > 1:
                    size = rows[axis - 3]
                    terms = jax.lax.dynamic_slice_in_dim(terms, index * size, size, axis=axis)
        queries, keys = (
            index * size + jnp.arange(size, dtype=jnp.int32)
            for index, size in zip((i, j), rows, strict=True)
        )
        more = []
        if kv_length % rows[1]:
            more.append(keys[None, :] < kv_length)
        if is_causal:
            more.append(queries[:, None] >= keys[None, :])
        for counted in more:
            counted = counted[None, None, None]
            terms = counted if terms is None else terms & counted
        return terms

    return of_tile
