"""Softmax attention tile by tile, in plain JAX: memory linear in the length, on any platform.

tiled_value keeps a running maximum and a running sum of each row of scores (Milakov and Gimelshein,
2018). Besides the output it returns lse, the logarithm of each row's sum of exponentials. From lse,
derivatives recompute the weights of a tile, P = exp(scores - lse) (Dao et al., 2022).

If several query heads, a group, share one head of key and value, a tile contains rows of all of
them, so that keys and values are not repeated. The kernels in softmax_kernels have the signatures
of tiled_value and tiled_gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import reshaped, zeros_like
from skyformer_jax.attention.tiles import Tiles, divide, loop, pad


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
    """Computes softmax(scale * Q K^T) V, and the logarithms of the sums that normalise it.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, kv_heads, head_dim]; heads is a multiple of kv_heads.
      value: [batch, kv_length, kv_heads, value_dim].
      scale: float32 scalar, the factor of the scores.
      mask: bool [batch or 1, heads or 1, q_length or 1, kv_length or 1], True where a query may
        attend to a key.
      tile: the maximum length of a tile along the longer and the shorter of query and key.
      is_causal: query i attends to keys 0..i only.
      skips: skips the tiles that causality excludes; JAX's reverse mode cannot differentiate that.

    Returns:
      out [batch, q_length, heads, value_dim] and lse [batch, heads, q_length], float32, or float64
      if any input is. A query without any key has out 0 and lse infinity, so that
      exp(score - lse) is 0.
    """
    tiles = divide(query, key, mask, tile, is_causal, skips)
    dtype = _dtype(query, key, value)
    q = scale * _split(query, key, tiles.query_rows, dtype)
    k, v = (_split(x, key, tiles.key_rows, dtype) for x in (key, value))

    def by_query(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        queries = _block(q, i, tiles.query_rows)

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, mass, sums = carry
            keys, values = (_block(x, j, tiles.key_rows) for x in (k, v))
            scores = _only(queries @ _transposed(keys), tiles.terms(i, j), tiles.group)
            # The maximum only keeps the exponentials in range, so it needs no gradient.
            new_top = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1, keepdims=True)))
            weights, faded = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            mass = faded * mass + weights.sum(axis=-1, keepdims=True)
            return new_top, mass, faded * sums + weights @ values

        zeros = zeros_like(queries, last=1)
        least = zeros + jnp.finfo(dtype).min
        sums = zeros_like(queries, last=value.shape[-1])
        top, mass, sums = loop(*tiles.keys_of(i), by_key, (least, zeros, sums))
        some = mass > 0
        mass = jnp.where(some, mass, 1)
        blocks = sums / mass, jnp.where(some, top + jnp.log(mass), jnp.inf)
        return tuple(_put(x, block, i) for x, block in zip(results, blocks, strict=True))

    zeros = (zeros_like(q, last=value.shape[-1]), zeros_like(q, last=1))
    out, lse = loop(0, tiles.query_blocks, by_query, zeros)
    return _joined(out, query), jnp.moveaxis(_joined(lse, query)[..., 0], 1, 2)


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
    """Computes the gradients of (tiled_value(query, key, value, scale, mask)[0] * d_out).sum().

    With P = exp(scores - lse) and dS = P * (d_out v^T - (d_out * out) 1), they are

        d_value = P^T d_out,   d_query = scale dS k,   d_key = scale dS^T q.

    Args:
      query: as in tiled_value.
      key: likewise.
      value: likewise.
      scale: likewise.
      mask: likewise.
      out: the output of tiled_value.
      lse: the second result of tiled_value.
      d_out: [batch, q_length, heads, value_dim].
      tile: as in tiled_value.
      is_causal: likewise.
      skips: likewise.

    Returns:
      Arrays of the shapes of query, key and value, float32, or float64 if any input is.
    """
    tiles = divide(query, key, mask, tile, is_causal, skips, keys_long=True)
    dtype = _dtype(query, key, value)
    means = (out.astype(dtype) * d_out.astype(dtype)).sum(axis=-1, keepdims=True)
    q, d_o, means, sums = (
        _split(x, key, tiles.query_rows, dtype)
        for x in (query, d_out, means, jnp.moveaxis(lse, 1, 2)[..., None])
    )
    q = scale * q
    k, v = (_split(x, key, tiles.key_rows, dtype) for x in (key, value))

    def of_tile(i: Any, j: Any) -> tuple[jax.Array, ...]:
        of_queries = (_block(x, i, tiles.query_rows) for x in (q, d_o, means, sums))
        of_keys = (_block(x, j, tiles.key_rows) for x in (k, v))
        return _tile_gradients(*of_queries, *of_keys, terms=tiles.terms(i, j), tiles=tiles)

    def by_key(j: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = gradients

        def by_query(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, d_keys, d_values = carry
            d_queries, more_keys, more_values = of_tile(i, j)
            return _add(d_query, d_queries, i), d_keys + more_keys, d_values + more_values

        zeros = (zeros_like(_block(x, j, tiles.key_rows)) for x in (k, v))
        d_query, *blocks = loop(*tiles.queries_of(j), by_query, (d_query, *zeros))
        return d_query, _put(d_key, blocks[0], j), _put(d_value, blocks[1], j)

    def by_query(i: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = gradients

        def by_key(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_queries, d_key, d_value = carry
            more, d_keys, d_values = of_tile(i, j)
            return d_queries + more, _add(d_key, d_keys, j), _add(d_value, d_values, j)

        zeros = zeros_like(_block(q, i, tiles.query_rows))
        d_queries, d_key, d_value = loop(*tiles.keys_of(i), by_key, (zeros, d_key, d_value))
        return _put(d_query, d_queries, i), d_key, d_value

    zeros = tuple(map(zeros_like, (q, k, v)))
    if tiles.keys_long:
        d_query, d_key, d_value = loop(0, tiles.key_blocks, by_key, zeros)
    else:
        d_query, d_key, d_value = loop(0, tiles.query_blocks, by_query, zeros)
    return _joined(scale * d_query, query), _joined(d_key, key), _joined(d_value, value)


def _tile_gradients(
    query: jax.Array,
    d_out: jax.Array,
    means: jax.Array,
    lse: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    terms: jax.Array | None,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes dS k, dS^T q and P^T d_out of a tile, whose longer side is its rows."""
    if tiles.keys_long:
        scores = _only(key @ _transposed(query), terms, tiles.group, axis=3)
        weights = jnp.exp(scores - _transposed(lse))
        d_scores = weights * (value @ _transposed(d_out) - _transposed(means))
        return _transposed(d_scores) @ key, d_scores @ query, weights @ d_out
    scores = _only(query @ _transposed(key), terms, tiles.group)
    weights = jnp.exp(scores - lse)
    d_scores = weights * (d_out @ _transposed(value) - means)
    return d_scores @ key, _transposed(d_scores) @ query, _transposed(weights) @ d_out


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
    """Computes the tangent of tiled_value(...)[0] for the tangents of query, key and value.

    It is (P * dS) v + P d_v - ((P * dS) 1) out, with dS = scale (d_q . k + q . d_k).

    Returns:
      [batch, q_length, heads, value_dim], float32, or float64 if any input is.
    """
    tiles = divide(query, key, mask, tile, is_causal, skips)
    dtype = _dtype(query, key, value)
    q, d_q, o, sums = (
        _split(x, key, tiles.query_rows, dtype)
        for x in (query, d_query, out, jnp.moveaxis(lse, 1, 2)[..., None])
    )
    q, d_q = scale * q, scale * d_q
    k, v, d_k, d_v = (_split(x, key, tiles.key_rows, dtype) for x in (key, value, d_key, d_value))

    def by_query(i: jax.Array, tangent: jax.Array) -> jax.Array:
        queries, d_queries, outs, lses = (_block(x, i, tiles.query_rows) for x in (q, d_q, o, sums))

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            moved, mass = carry
            keys, values, d_keys, d_values = (
                _block(x, j, tiles.key_rows) for x in (k, v, d_k, d_v)
            )
            scores = _only(queries @ _transposed(keys), tiles.terms(i, j), tiles.group)
            weights = jnp.exp(scores - lses)
            d_scores = d_queries @ _transposed(keys) + queries @ _transposed(d_keys)
            d_scores = weights * d_scores
            moved += d_scores @ values + weights @ d_values
            return moved, mass + d_scores.sum(axis=-1, keepdims=True)

        carry = zeros_like(outs), zeros_like(lses)
        moved, mass = loop(*tiles.keys_of(i), by_key, carry)
        return _put(tangent, moved - mass * outs, i)

    return _joined(loop(0, tiles.query_blocks, by_query, zeros_like(o)), query)


def _dtype(*arrays: jax.Array) -> Any:
    """The dtype of the computation."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def _split(x: jax.Array, key: jax.Array, rows: int, dtype: Any) -> jax.Array:
    """[batch, length, heads, dim] -> [batch, kv_heads, group, length, dim], for blocks of rows.

    The length is padded with zeros to a multiple of rows. A head's rows are then contiguous in
    memory, which makes the products faster.
    """
    batch, length, heads, dim = x.shape
    shape = (batch, length, key.shape[2], heads // key.shape[2], dim)
    x = reshaped(x, shape, lambda spec: (*spec[:3], None, spec[3]))
    return pad(jnp.moveaxis(x, 1, 3).astype(dtype), rows, axis=3)


def _joined(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of _split; the result has the length and the heads of `like`."""
    x = jnp.moveaxis(x[:, :, :, : like.shape[1]], 3, 1)
    shape = (*like.shape[:3], x.shape[-1])
    return reshaped(x, shape, lambda spec: (*spec[:3], spec[4]))


def _block(array: jax.Array, index: Any, rows: int) -> jax.Array:
    """Block `index` of an array from _split, as [batch, kv_heads, group * rows, dim]."""
    block = jax.lax.dynamic_slice_in_dim(array, index * rows, rows, axis=3)
    batch, kv_heads, group, _, dim = block.shape
    return reshaped(
        block, (batch, kv_heads, group * rows, dim), lambda spec: (*spec[:2], None, spec[4])
    )


def _put(array: jax.Array, block: jax.Array, index: Any) -> jax.Array:
    """The array with block `index` replaced."""
    rows = block.shape[2] // array.shape[2]
    shape = (*array.shape[:3], rows, array.shape[4])
    block = reshaped(block, shape, lambda spec: (*spec[:2], None, None, spec[3]))
    return jax.lax.dynamic_update_slice_in_dim(array, block, index * rows, axis=3)


def _add(array: jax.Array, block: jax.Array, index: Any) -> jax.Array:
    """The array with something added to block `index`."""
    rows = block.shape[2] // array.shape[2]
    return _put(array, _block(array, index, rows) + block, index)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _only(scores: jax.Array, terms: jax.Array | None, group: int, *, axis: int = 2) -> jax.Array:
    """Sets the scores that do not count to -inf.

    Args:
      scores: [batch, kv_heads, group * query rows, key rows], or with the last two axes swapped.
      terms: see tiles.Tiles.
      group: likewise.
      axis: the axis of the queries, 2 or 3.
    """
    if terms is None:
        return scores
    rows = scores.shape[axis] // group
    shape = (*scores.shape[:axis], group, rows, *scores.shape[axis + 1 :])
    split = reshaped(scores, shape, lambda spec: (*spec[:2], None, None, None))
    split = jnp.where(jnp.moveaxis(terms, -1, 2) if axis == 3 else terms, split, -jnp.inf)
    return reshaped(split, scores.shape, lambda spec: (*spec[:2], None, None))
