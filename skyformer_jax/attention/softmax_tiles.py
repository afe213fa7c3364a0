"""Softmax attention tile by tile, in plain JAX: memory linear in the length, on any platform.

The value takes a running maximum and a running sum of each row of scores (Milakov and Gimelshein,
2018). Beside the output it returns the logarithm of each row's sum of exponentials, lse, from which
derivatives compute the weights of a tile anew, P = exp(scores - lse) (Dao et al., 2022).

Blocks are [batch, kv_heads, group, rows, head_dim] here, where the heads of a group share one of
key and value; kernels for accelerators have the signatures of tiled_value and tiled_gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import reshaped, zeros_like
from skyformer_jax.attention.tiles import loop, pad, tile_rows


def tiled_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None = None,
    *,
    tile: tuple[int, int],
    is_causal: bool = False,
    skips: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale * Q K^T) V, and the logarithms of the sums that normalise it.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, kv_heads, head_dim]; heads is a multiple of kv_heads.
      value: [batch, kv_length, kv_heads, value_dim].
      scale: float32 scalar, the factor of the scores.
      mask: bool [batch or 1, heads or 1, q_length or 1, kv_length or 1], True where a query may
        attend to a key.
      tile: the most rows of a tile along the longer and along the shorter of query and key.
      is_causal: query i attends to keys 0..i only.
      skips: leaves out the tiles that causality rules out; JAX cannot differentiate that backwards.

    Returns:
      out [batch, q_length, heads, value_dim] and lse [batch, heads, q_length], float32, or float64
      if an array is. A query without any key has out 0 and lse infinity, so that exp(score - lse)
      is 0.
    """
    tiles = _tiles(query, key, mask, tile, is_causal, skips)
    dtype = _dtype(query, key, value)
    q = pad(_grouped(query, key.shape[2]), tiles.query_rows)
    k, v = (pad(_grouped(x, key.shape[2]), tiles.key_rows) for x in (key, value))
    least = jnp.finfo(dtype).min

    def by_query(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, lse = results
        queries = scale * _block(q, i, tiles.query_rows, dtype)

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, mass, sums = carry
            keys, values = (_block(x, j, tiles.key_rows, dtype)[:, :, 0] for x in (k, v))
            scores = _scores(queries, keys, tiles.terms(i, j))
            # The maximum only keeps exponentials in range: a constant to derivatives.
            new_top = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1, keepdims=True)))
            weights = jnp.exp(scores - new_top)
            faded = jnp.exp(top - new_top)
            mass = faded * mass + weights.sum(axis=-1, keepdims=True)
            sums = faded * sums + jnp.einsum("bhgqk,bhkp->bhgqp", weights, values)
            return new_top, mass, sums

        zeros = zeros_like(queries, last=1)
        carry = (zeros + least, zeros, zeros_like(queries, last=value.shape[-1]))
        top, mass, sums = loop(tiles.key_blocks(i), by_key, carry)
        some = mass > 0
        mass = jnp.where(some, mass, 1)
        lse_block = jnp.where(some, top + jnp.log(mass), jnp.inf)
        return _put(out, sums / mass, i), _put(lse, lse_block, i)

    zeros = (zeros_like(q, dtype, last=value.shape[-1]), zeros_like(q, dtype, last=1))
    out, lse = loop(tiles.query_blocks, by_query, zeros)
    lse = jnp.moveaxis(_ungrouped(lse, query)[..., 0], 1, 2)
    return _ungrouped(out, query), lse


def tiled_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    tile: tuple[int, int],
    is_causal: bool = False,
    skips: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of (tiled_value(query, key, value, scale, mask)[0] * d_out).sum().

    With P = exp(scores - lse) they are, for dS = P * (d_out v^T - (d_out * out) 1),

        d_value = P^T d_out,   d_query = scale dS k,   d_key = scale dS^T q.

    Args:
      query: as in tiled_value.
      key: likewise.
      value: likewise.
      scale: likewise.
      mask: likewise.
      out: what tiled_value returned.
      lse: likewise.
      d_out: [batch, q_length, heads, value_dim].
      tile: as in tiled_value.
      is_causal: likewise.
      skips: likewise.

    Returns:
      Arrays of the shapes of query, key and value, float32, or float64 if an array is.
    """
    tiles = _tiles(query, key, mask, tile, is_causal, skips)
    dtype = _dtype(query, key, value)
    q, k, v, lse, d_o = _operands(tiles, query, key, value, lse, d_out)
    o = pad(_grouped(out, key.shape[2]), tiles.query_rows)

    def by_query(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = gradients
        queries, outs, d_outs, lses = (
            _block(x, i, tiles.query_rows, dtype) for x in (q, o, d_o, lse)
        )
        queries = scale * queries
        means = (outs * d_outs).sum(axis=-1, keepdims=True)

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_queries, d_key, d_value = carry
            keys, values = (_block(x, j, tiles.key_rows, dtype)[:, :, 0] for x in (k, v))
            weights = jnp.exp(_scores(queries, keys, tiles.terms(i, j)) - lses)
            d_scores = weights * (jnp.einsum("bhgqp,bhkp->bhgqk", d_outs, values) - means)
            d_keys = jnp.einsum("bhgqk,bhgqp->bhkp", d_scores, queries)
            d_values = jnp.einsum("bhgqk,bhgqp->bhkp", weights, d_outs)
            return (
                d_queries + jnp.einsum("bhgqk,bhkp->bhgqp", d_scores, keys),
                _add(d_key, d_keys[:, :, None], j),
                _add(d_value, d_values[:, :, None], j),
            )

        carry = (zeros_like(queries), d_key, d_value)
        d_queries, d_key, d_value = loop(tiles.key_blocks(i), by_key, carry)
        return _put(d_query, scale * d_queries, i), d_key, d_value

    zeros = tuple(zeros_like(x, dtype) for x in (q, k, v))
    gradients = loop(tiles.query_blocks, by_query, zeros)
    pairs = zip(gradients, (query, key, value), strict=True)
    d_query, d_key, d_value = (_ungrouped(x, like) for x, like in pairs)
    return d_query, d_key, d_value


def tiled_tangent(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_query: jax.Array,
    d_key: jax.Array,
    d_value: jax.Array,
    *,
    tile: tuple[int, int],
    is_causal: bool = False,
    skips: bool = True,
) -> jax.Array:
    """The tangent of tiled_value(...)[0] for the tangents of query, key and value.

    It is (P * dS) v + P d_v - ((P * dS) 1) out for dS = scale (d_q . k + q . d_k).

    Returns:
      [batch, q_length, heads, value_dim], float32, or float64 if an array is.
    """
    tiles = _tiles(query, key, mask, tile, is_causal, skips)
    dtype = _dtype(query, key, value)
    q, k, v, lse, o = _operands(tiles, query, key, value, lse, out)
    d_q = pad(_grouped(d_query, key.shape[2]), tiles.query_rows)
    d_k, d_v = (pad(_grouped(x, key.shape[2]), tiles.key_rows) for x in (d_key, d_value))

    def by_query(i: jax.Array, tangent: jax.Array) -> jax.Array:
        queries, d_queries, outs, lses = (
            _block(x, i, tiles.query_rows, dtype) for x in (q, d_q, o, lse)
        )
        queries, d_queries = scale * queries, scale * d_queries

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            sums, mass = carry
            keys, values, d_keys, d_values = (
                _block(x, j, tiles.key_rows, dtype)[:, :, 0] for x in (k, v, d_k, d_v)
            )
            weights = jnp.exp(_scores(queries, keys, tiles.terms(i, j)) - lses)
            d_scores = jnp.einsum("bhgqp,bhkp->bhgqk", d_queries, keys)
            d_scores = weights * (d_scores + jnp.einsum("bhgqp,bhkp->bhgqk", queries, d_keys))
            sums += jnp.einsum("bhgqk,bhkp->bhgqp", d_scores, values)
            sums += jnp.einsum("bhgqk,bhkp->bhgqp", weights, d_values)
            return sums, mass + d_scores.sum(axis=-1, keepdims=True)

        carry = (zeros_like(outs), zeros_like(lses))
        sums, mass = loop(tiles.key_blocks(i), by_key, carry)
        return _put(tangent, sums - mass * outs, i)

    tangent = loop(tiles.query_blocks, by_query, zeros_like(o, dtype))
    return _ungrouped(tangent, query)


class _Tiles(NamedTuple):
    """How the scores are divided.

    Attributes:
      query_rows: of a tile.
      key_rows: of a tile.
      query_blocks: how many there are.
      key_blocks: for the index of a block of queries, how many blocks of keys it attends to.
      terms: for the indices of a tile, bool that broadcasts to its scores, or None for all.
    """

    query_rows: int
    key_rows: int
    query_blocks: int
    key_blocks: Callable[[Any], Any]
    terms: Callable[[Any, Any], jax.Array | None]


def _tiles(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    tile: tuple[int, int],
    is_causal: bool,
    skips: bool,
) -> _Tiles:
    q_length, kv_length, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    query_rows, key_rows = tile_rows(q_length, kv_length, tile)
    sizes = (query_rows, key_rows)
    num_queries, num_keys = -(-q_length // query_rows), -(-kv_length // key_rows)
    if mask is not None:
        heads = (1, 1) if mask.shape[1] == 1 else (key.shape[2], group)
        mask = reshaped(
            mask,
            (mask.shape[0], *heads, *mask.shape[2:]),
            lambda spec: (spec[0], spec[1], None, *spec[2:]),
        )
        missing = [
            (0, -mask.shape[axis] % rows if mask.shape[axis] > 1 else 0)
            for axis, rows in zip((3, 4), sizes, strict=True)
        ]
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), *missing))

    def terms(i: Any, j: Any) -> jax.Array | None:
        found = mask
        if found is not None:
            for axis, index, rows in zip((3, 4), (i, j), sizes, strict=True):
                if found.shape[axis] > 1:
                    found = jax.lax.dynamic_slice_in_dim(found, index * rows, rows, axis=axis)
        keys = j * key_rows + jnp.arange(key_rows, dtype=jnp.int32)
        if num_keys * key_rows > kv_length:
            real = (keys < kv_length)[None, None, None, None, :]
            found = real if found is None else found & real
        if is_causal:
            queries = i * query_rows + jnp.arange(query_rows, dtype=jnp.int32)
            earlier = (queries[:, None] >= keys[None, :])[None, None, None]
            found = earlier if found is None else found & earlier
        return found

    def key_blocks(i: Any) -> Any:
        if not (is_causal and skips) or num_queries == 1 or num_keys == 1:
            return num_keys
        return jnp.minimum(num_keys, -(-((i + 1) * query_rows) // key_rows))

    return _Tiles(query_rows, key_rows, num_queries, key_blocks, terms)


def _dtype(*arrays: jax.Array) -> Any:
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def _operands(
    tiles: _Tiles,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lse: jax.Array,
    of_rows: jax.Array,
) -> tuple[jax.Array, ...]:
    """Query, key, value, lse and another array of the queries' rows, as they are cut to blocks."""
    kv_heads = key.shape[2]
    lse = jnp.moveaxis(lse, 1, 2)[..., None]
    q, lse, of_rows = (pad(_grouped(x, kv_heads), tiles.query_rows) for x in (query, lse, of_rows))
    k, v = (pad(_grouped(x, kv_heads), tiles.key_rows) for x in (key, value))
    return q, k, v, lse, of_rows


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, dim] as [batch, length, kv_heads, group, dim]."""
    batch, length, heads, dim = x.shape
    shape = (batch, length, kv_heads, heads // kv_heads, dim)
    return reshaped(x, shape, lambda spec: (*spec[:3], None, spec[3]))


def _ungrouped(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of _grouped, without what pads the length."""
    shape = (*x.shape[:2], like.shape[2], x.shape[-1])
    x = reshaped(x, shape, lambda spec: (*spec[:3], spec[4]))
    return x[:, : like.shape[1]]


def _block(array: jax.Array, index: Any, rows: int, dtype: Any) -> jax.Array:
    """Block index of [batch, length, kv_heads, group, dim]."""
    block = jax.lax.dynamic_slice_in_dim(array, index * rows, rows, axis=1)
    return jnp.moveaxis(block, 1, 3).astype(dtype)


def _put(array: jax.Array, block: jax.Array, index: Any) -> jax.Array:
    """The array with its block index replaced."""
    rows = block.shape[3]
    return jax.lax.dynamic_update_slice_in_dim(
        array, jnp.moveaxis(block, 3, 1), index * rows, axis=1
    )


def _add(array: jax.Array, block: jax.Array, index: Any) -> jax.Array:
    """The array with something added to its block index."""
    return _put(array, _block(array, index, block.shape[3], array.dtype) + block, index)


def _scores(query: jax.Array, key: jax.Array, terms: jax.Array | None) -> jax.Array:
    """Q . k for two blocks, -inf where terms is False."""
    scores = jnp.einsum("bhgqp,bhkp->bhgqk", query, key)
    return scores if terms is None else jnp.where(terms, scores, -jnp.inf)
