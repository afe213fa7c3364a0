"""The Gaussian primitive tile by tile, in plain JAX: memory linear in the length, on any platform.

Blocks are float32 [batch, heads, rows, head_dim], whatever the dtype of the arrays. So no float32
copy of the whole arrays is needed, and the products are plain matrix products.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import zeros_like
from skyformer_jax.attention.sums import sum_last, sum_rows
from skyformer_jax.attention.tiles import causal_keys, loop, pad, tile_rows

_HIGHEST = jax.lax.Precision.HIGHEST


def kernel_values(half_distances: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Computes exp(-scale/2 ||q - k||^2) from ||q - k||^2 / 2."""
    exponent = -scale * half_distances
    # Rounding can make the exponent positive where points coincide. The correction has no gradient,
    # because the second derivative is largest there.
    return jnp.exp(exponent - jax.lax.stop_gradient(jnp.maximum(exponent, 0)))


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
) -> jax.Array:
    """Computes G(query, key) value.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, value_dim].
      scale: float32 scalar, the kernel's inverse squared width.
      mask: bool [batch or 1, heads or 1, q_length or 1, kv_length], True for the terms of the sum.
      tile: the maximum length of a tile along the longer and the shorter of query and key.
      is_causal: True restricts the sum of query i to keys 0..i.
      skips: skips the tiles that causality excludes; JAX's reverse mode cannot differentiate that.

    Returns:
      float32 [batch, q_length, heads, value_dim].
    """
    q_length, value_dim = query.shape[1], value.shape[-1]
    query_rows, key_rows = tile_rows(q_length, key.shape[1], tile)
    # Padded values and, in gradients, padded d_out are 0: such rows add nothing.
    query = pad(query, query_rows)
    key, value = pad(key, key_rows), pad(value, key_rows)
    terms = _terms(mask, query_rows, key_rows, is_causal)
    num_keys = key.shape[1] // key_rows
    skips = skips and is_causal and num_keys > 1

    def by_query(i: jax.Array, out: jax.Array) -> jax.Array:
        queries = _block(query, i, query_rows)
        stop = causal_keys(i, query_rows, key_rows, num_keys) if skips else num_keys

        def by_key(j: jax.Array, sums: jax.Array) -> jax.Array:
            scores = _tile_scores(queries, _block(key, j, key_rows), scale, terms(i, j))
            return sums + scores @ _block(value, j, key_rows)

        sums = loop(0, stop, by_key, zeros_like(queries, last=value_dim))
        return _put(out, sums, i)

    zeros = zeros_like(query, jnp.float32, last=value_dim)
    out = loop(0, query.shape[1] // query_rows, by_query, zeros)
    return out[:, :q_length]


def tiled_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    d_out: jax.Array,
    *,
    tile: tuple[int, int],
    is_causal: bool = False,
    skips: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of (tiled_value(...) * d_out).sum() for query, key and value.

    With S the scores and W = S * (d_out v^T), elementwise, they are d_v = S^T d_out,
    d_q = scale (W k - (W 1) q) and d_k = scale (W^T q - (W^T 1) k). Tiles need not accumulate
    W^T 1, because it equals v . d_v, row by row.

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    q_length, kv_length = query.shape[1], key.shape[1]
    query_rows, key_rows = tile_rows(q_length, kv_length, tile)
    query, d_out = pad(query, query_rows), pad(d_out, query_rows)
    key, value = pad(key, key_rows), pad(value, key_rows)
    terms = _terms(mask, query_rows, key_rows, is_causal)
    num_keys = key.shape[1] // key_rows
    skips = skips and is_causal and num_keys > 1

    def by_query(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = gradients
        queries, d_outs = (_block(x, i, query_rows) for x in (query, d_out))
        stop = causal_keys(i, query_rows, key_rows, num_keys) if skips else num_keys

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            w_keys, w_sums, d_key, d_value = carry
            keys, values = (_block(x, j, key_rows) for x in (key, value))
            w_k, w_1, wt_q, st_d_out = _tile_gradients(
                queries, keys, values, d_outs, scale, terms(i, j)
            )
            return w_keys + w_k, w_sums + w_1, _add(d_key, wt_q, j), _add(d_value, st_d_out, j)

        zeros = zeros_like(queries)
        w_keys, w_sums, d_key, d_value = loop(
            0, stop, by_key, (zeros, zeros[..., :1], d_key, d_value)
        )
        return _put(d_query, scale * (w_keys - w_sums * queries), i), d_key, d_value

    zeros = tuple(zeros_like(x, jnp.float32) for x in (query, key, value))
    d_query, d_key, d_value = loop(0, query.shape[1] // query_rows, by_query, zeros)
    v, k = (x.astype(jnp.float32) for x in (value, key))
    d_key = scale * (d_key - sum_last(v * d_value) * k)
    return d_query[:, :q_length], d_key[:, :kv_length], d_value[:, :kv_length]


def tiled_tangent(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    d_query: jax.Array,
    d_key: jax.Array,
    d_value: jax.Array,
    d_scale: jax.Array,
    *,
    tile: tuple[int, int],
    is_causal: bool = False,
) -> jax.Array:
    """Computes the tangent of tiled_value(...) for the tangents of its arguments.

    It is (S * d_E) v + S d_v, where the tangent of the exponent E is
    d_E = scale (d_q . (k - q) + d_k . (q - k)) - d_scale/2 ||q - k||^2.

    Returns:
      float32 [batch, q_length, heads, value_dim].
    """
    q_length, value_dim = query.shape[1], value.shape[-1]
    query_rows, key_rows = tile_rows(q_length, key.shape[1], tile)
    terms = _terms(mask, query_rows, key_rows, is_causal)
    query, d_query = (pad(x, query_rows) for x in (query, d_query))
    key, value, d_key, d_value = (pad(x, key_rows) for x in (key, value, d_key, d_value))

    def by_query(i: jax.Array, out: jax.Array) -> jax.Array:
        q, d_q = (_block(x, i, query_rows) for x in (query, d_query))

        def by_key(j: jax.Array, sums: jax.Array) -> jax.Array:
            k, v, d_k, d_v = (_block(x, j, key_rows) for x in (key, value, d_key, d_value))
            half_distances = _half_distances(q, k)
            d_exponent = -d_scale * half_distances
            d_exponent += scale * (_differences(d_q, q, k) + _transposed(_differences(d_k, k, q)))
            scores = only(terms(i, j), kernel_values(half_distances, scale))
            return sums + (scores * d_exponent) @ v + scores @ d_v

        sums = loop(0, key.shape[1] // key_rows, by_key, zeros_like(q, last=value_dim))
        return _put(out, sums, i)

    zeros = zeros_like(query, jnp.float32, last=value_dim)
    out = loop(0, query.shape[1] // query_rows, by_query, zeros)
    return out[:, :q_length]


def _block(array: jax.Array, index: jax.Array | int, rows: int) -> jax.Array:
    """Block `index` of an array [batch, length, heads, head_dim]."""
    block = jax.lax.dynamic_slice_in_dim(array, index * rows, rows, axis=1)
    return jnp.swapaxes(block, 1, 2).astype(jnp.float32)


def _put(array: jax.Array, block: jax.Array, index: jax.Array | int) -> jax.Array:
    """The array with block `index` replaced."""
    rows = block.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(
        array, jnp.swapaxes(block, 1, 2), index * rows, axis=1
    )


def _add(array: jax.Array, block: jax.Array, index: jax.Array | int) -> jax.Array:
    """The array with something added to block `index`."""
    return _put(array, _block(array, index, block.shape[2]) + block, index)


def _terms(
    mask: jax.Array | None, query_rows: int, key_rows: int, is_causal: bool
) -> Callable[[Any, Any], jax.Array | None]:
    """A function from a tile's indices to which of its scores count, or None if all do."""
    if mask is not None:
        # The mask's padding has no effect: values and gradients there are 0.
        missing = (
            -mask.shape[2] % query_rows if mask.shape[2] > 1 else 0,
            -mask.shape[3] % key_rows,
        )
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])))

    def of_tile(i: Any, j: Any) -> jax.Array | None:
        terms = mask
        if mask is not None:
            terms = jax.lax.dynamic_slice_in_dim(mask, j * key_rows, key_rows, axis=3)
            if mask.shape[2] > 1:
                terms = jax.lax.dynamic_slice_in_dim(terms, i * query_rows, query_rows, axis=2)
        if is_causal:
            queries = i * query_rows + jnp.arange(query_rows, dtype=jnp.int32)
            keys = j * key_rows + jnp.arange(key_rows, dtype=jnp.int32)
            earlier = (queries[:, None] >= keys[None, :])[None, None]
            terms = earlier if terms is None else terms & earlier
        return terms

    return of_tile


def only(terms: jax.Array | None, scores: jax.Array) -> jax.Array:
    """Sets the scores that do not count to 0; terms None means that all count."""
    return scores if terms is None else jnp.where(terms, scores, 0)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _tile_scores(
    query: jax.Array, key: jax.Array, scale: jax.Array, terms: jax.Array | None
) -> jax.Array:
    """Scores [batch, heads, query rows, key rows] of two blocks."""
    return only(terms, kernel_values(_half_distances(query, key), scale))


def _half_distances(query: jax.Array, key: jax.Array) -> jax.Array:
    """||q_i - k_j||^2 / 2."""
    products = jnp.matmul(query, _transposed(key), precision=_HIGHEST)
    query_norms, key_norms = sum_last(query * query), _transposed(sum_last(key * key))
    return 0.5 * (query_norms + key_norms) - products


def _differences(directions: jax.Array, here: jax.Array, there: jax.Array) -> jax.Array:
    """directions_i . (there_j - here_i)."""
    products = jnp.matmul(directions, _transposed(there), precision=_HIGHEST)
    return products - sum_last(directions * here)


def _tile_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    scale: jax.Array,
    terms: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes W k, W 1, W^T q and S^T d_out for scores S and W = S * (d_out v^T).

    The tile's longer side is its rows, which makes the matrix products faster. The terms of the
    differences W k - (W 1) q are computed at the highest precision.
    """
    if query.shape[2] >= key.shape[2]:
        s = _tile_scores(query, key, scale, terms)
        w = s * (d_out @ _transposed(value))
        sums = sum_last(w)
        w_key = jnp.matmul(w, key, precision=_HIGHEST)
        w_query = jnp.matmul(_transposed(w), query, precision=_HIGHEST)
        return w_key, sums, w_query, _transposed(s) @ d_out
    s = _tile_scores(key, query, scale, None if terms is None else _transposed(terms))
    w = s * (value @ _transposed(d_out))
    sums = _transposed(sum_rows(w))
    w_key = jnp.matmul(_transposed(w), key, precision=_HIGHEST)
    return w_key, sums, jnp.matmul(w, query, precision=_HIGHEST), s @ d_out
