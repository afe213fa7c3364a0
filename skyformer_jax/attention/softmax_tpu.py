"""Softmax attention as Pallas kernels for TPUs, through Mosaic.

They follow Dao et al. (2022): the forward pass keeps a running maximum and sum, and gradients
recompute P = exp(scale q k - lse) and dS = P (d_out v - delta), with delta = d_out out. See
tpu_tiles for the layout, the grid and the precision. Queries pass by, keys stay. Queries, keys and
values are centred on their means. Differences between a query's scores then lack only the mean
query's products with the keys, which are added in float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from skyformer_jax.attention import tpu_tiles
from skyformer_jax.attention.kernel_inputs import LOG2E, mean_of_keys
from skyformer_jax.attention.tpu_tiles import (
    Operands,
    Sizes,
    column,
    columns,
    matmul,
    points,
    rows,
    sizes,
    with_ones,
)

# Used instead of -inf, so that no difference is NaN: the exponents of masked keys, and the initial
# value of the running maximum.
_NEVER, _LOWEST = -1e30, -1e29


def tpu_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax(scale * query key^T) value, and the logarithm of its normalisation.

    Args:
      query: float32 or bfloat16 [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, value_dim]; it must be finite at masked keys too.
      scale: float32 scalar, factor of the scores.
      mask: bool [batch, kv_length], True at real keys; None if all keys are real.
      is_causal: whether query i attends to keys 0..i only.
      interpret: runs the kernel in Pallas's interpret mode, on a CPU.

    Returns:
      out, float32 [batch, q_length, heads, value_dim], 0 for a query without keys; and lse, float32
      [batch, heads, q_length], the logarithm of the sum of the scores' exponentials, infinity for
      a query without keys, so that exp(score - lse) is 0.
    """
    how = tpu_tiles.operands(query, key, value)
    tile = tpu_tiles.most_rows(how, query, value)
    x, y = sizes(query.shape[1], tile), sizes(key.shape[1], tile)
    staying = [columns(key, y.length), columns(value, y.length), _restriction(key, mask, y)]
    value_dim = staying[1].shape[1]
    out, lse = tpu_tiles.by_tiles(
        functools.partial(_value_kernel, how=how, is_causal=is_causal),
        _constants(scale, query, key, value),
        [columns(query, x.length)],
        staying,
        [value_dim, 1],
        [],
        x=x,
        y=y,
        sums=[(value_dim + tpu_tiles.ONES, x.tile), (1, x.tile)],
        contracted=[staying[0].shape[1]],
        produced=[value_dim + tpu_tiles.ONES],
        how=how,
        name="softmax",
        interpret=interpret,
    )
    batch, length, heads, _ = query.shape
    lse = lse[:, 0, :length].reshape(batch, heads, length)
    return rows(out, (batch, length, heads, value.shape[3])), lse


def tpu_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    is_causal: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of (tpu_value(query, key, value, scale, mask)[0] * d_out).sum().

    Args:
      query: as in tpu_value.
      key: likewise.
      value: likewise.
      scale: likewise.
      mask: likewise.
      out: the output of tpu_value.
      lse: the second result of tpu_value.
      d_out: [batch, q_length, heads, value_dim].
      is_causal: as in tpu_value.
      interpret: likewise.

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    how = tpu_tiles.operands(query, key, value)
    tile = tpu_tiles.most_rows(how, query, value)
    x, y = sizes(query.shape[1], tile), sizes(key.shape[1], tile, tpu_tiles.PART)
    staying = [columns(key, y.length), columns(value, y.length), _restriction(key, mask, y)]
    # Queries without keys, and padding, attend to nothing.
    lse = jnp.where(jnp.isfinite(lse), LOG2E * lse, -_NEVER).reshape(-1, 1, lse.shape[2])
    missing = x.length - lse.shape[2]
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, missing)), constant_values=-_NEVER)
    passing = [columns(z, x.length) for z in (query, d_out, out)]
    dim, value_dim = (array.shape[1] for array in passing[:2])
    d_query, d_key, d_value = tpu_tiles.by_tiles(
        functools.partial(_gradients_kernel, how=how, is_causal=is_causal),
        _constants(scale, query, key, value),
        [*passing, lse],
        staying,
        [dim],
        [dim, value_dim],
        x=x,
        y=y,
        sums=[(dim + tpu_tiles.ONES, length) for length in (x.tile, y.part)],
        contracted=[dim, value_dim],
        produced=[dim + tpu_tiles.ONES, dim + tpu_tiles.ONES, value_dim],
        how=how,
        name="softmax_gradients",
        interpret=interpret,
    )
    return (
        scale * rows(d_query, query.shape),
        scale * rows(d_key, key.shape),
        rows(d_value, value.shape),
    )


def _constants(
    scale: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
) -> list[jax.Array]:
    """The scale times log2(e) as [1, 1], and the means as [batch * heads, dim, 1]."""
    means = (columns(mean_of_keys(x), 1) for x in (query, key, value))
    return [(scale * LOG2E).reshape(1, 1), *means]


def _restriction(key: jax.Array, mask: jax.Array | None, y: Sizes) -> jax.Array:
    """The mask as a term of each key's exponents: float32 [batch, 1, length], 0 or _NEVER."""
    batch, length = key.shape[:2]
    real = jnp.zeros((batch, length), jnp.float32)
    if mask is not None:
        real = jnp.where(mask, real, _NEVER)
    filled = jnp.pad(real, ((0, 0), (0, y.length - length)), constant_values=_NEVER)
    return filled[:, None]


def _of_keys(
    restriction_ref: Any,
    key_ref: Any,
    key_mean_ref: Any,
    query_mean_ref: Any,
    scale: jax.Array,
    how: Operands,
) -> jax.Array:
    """[1, keys]: the term of each key's exponents that is the same for all queries."""
    if not how.centred:
        return restriction_ref[0]
    key = key_ref[0].astype(jnp.float32) - key_mean_ref[0]  # not rounded: the mean may be large
    return restriction_ref[0] + scale * (query_mean_ref[0] * key).sum(axis=0, keepdims=True)


def _causal(exponents: jax.Array, behind: jax.Array) -> jax.Array:
    """Sets the exponents [keys, queries] of keys that come after the query to _NEVER."""
    at_key, at_query = (
        jax.lax.broadcasted_iota(jnp.int32, exponents.shape, axis) for axis in (0, 1)
    )
    return jnp.where(behind + at_key <= at_query, exponents, _NEVER)


def _by_mean_key(query_ref: Any, key_mean_ref: Any, scale: jax.Array, how: Operands) -> Any:
    """[1, queries]: the amount that centring the keys has subtracted from a query's exponents."""
    if not how.centred:
        return 0
    products = query_ref[0].astype(jnp.float32) * key_mean_ref[0]
    return scale * products.sum(axis=0, keepdims=True)


def _value_kernel(
    first_ref: Any, scale_ref: Any, query_mean_ref: Any, key_mean_ref: Any, value_mean_ref: Any,
    query_ref: Any, key_ref: Any, value_ref: Any, restriction_ref: Any,
    out_ref: Any, lse_ref: Any, sums: Any, maxima: Any, *, how: Operands, is_causal: bool,
) -> None:  # fmt: skip
    j = pl.program_id(2)
    dim, scale = out_ref.shape[1], scale_ref[...]

    @pl.when(j == 0)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        maxima[...] = jnp.full(maxima.shape, _LOWEST, jnp.float32)

    behind = _behind(first_ref, query_ref, key_ref)

    # Causality leaves out a tile whose first key comes after its last query.
    @pl.when(jnp.logical_or(not is_causal, behind < query_ref.shape[2]))
    def _() -> None:
        query = points(query_ref, query_mean_ref, how)
        key = points(key_ref, key_mean_ref, how)
        value = points(value_ref, value_mean_ref, how)
        of_keys = _of_keys(restriction_ref, key_ref, key_mean_ref, query_mean_ref, scale, how)
        exponents = scale * matmul(key, query, 0, 0) + column(of_keys)
        if is_causal:
            exponents = _causal(exponents, behind)
        before = maxima[...]
        now = jnp.maximum(before, exponents.max(axis=0, keepdims=True))
        weights = jnp.exp2(exponents - now).astype(how.dtype)
        sums[...] = sums[...] * jnp.exp2(before - now) + matmul(with_ones(value), weights, 1, 0)
        maxima[...] = now

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        mass = sums[dim : dim + 1]
        some = mass > 0
        out = sums[:dim] / jnp.where(some, mass, 1)
        if how.centred:
            out += value_mean_ref[0]
        out_ref[0] = jnp.where(some, out, 0)
        lse = maxima[...] + jnp.log2(jnp.where(some, mass, 1))
        lse += _by_mean_key(query_ref, key_mean_ref, scale, how)
        lse_ref[0] = jnp.where(some, math.log(2) * lse, jnp.inf)


def _gradients_kernel(
    first_ref: Any, scale_ref: Any, query_mean_ref: Any, key_mean_ref: Any, value_mean_ref: Any,
    query_ref: Any, d_out_ref: Any, out_ref: Any, lse_ref: Any,
    key_ref: Any, value_ref: Any, restriction_ref: Any,
    d_query_ref: Any, d_key_ref: Any, d_value_ref: Any, query_sums: Any, key_sums: Any,
    *, how: Operands, is_causal: bool,
) -> None:  # fmt: skip
    i, j = pl.program_id(1), pl.program_id(2)
    (dim, num_keys), scale = key_ref.shape[1:], scale_ref[...]
    here = pl.ds(pl.multiple_of(j * num_keys, tpu_tiles.LANES), num_keys)

    @pl.when(j == 0)
    def _() -> None:
        query_sums[...] = jnp.zeros(query_sums.shape, jnp.float32)

    @pl.when(i == 0)
    def _() -> None:
        key_sums[:, here] = jnp.zeros((key_sums.shape[0], num_keys), jnp.float32)
        d_value_ref[0, :, here] = jnp.zeros((d_value_ref.shape[1], num_keys), jnp.float32)

    behind = _behind(first_ref, query_ref, key_ref)

    # Causality leaves out a tile whose first key comes after its last query.
    @pl.when(jnp.logical_or(not is_causal, behind < query_ref.shape[2]))
    def _() -> None:
        query = points(query_ref, query_mean_ref, how)
        key = points(key_ref, key_mean_ref, how)
        value = points(value_ref, value_mean_ref, how)
        d_out, out = d_out_ref[0].astype(how.dtype), out_ref[0]
        if how.centred:
            out -= value_mean_ref[0]
        of_keys = _of_keys(restriction_ref, key_ref, key_mean_ref, query_mean_ref, scale, how)
        exponents = scale * matmul(key, query, 0, 0) + column(of_keys)
        if is_causal:
            exponents = _causal(exponents, behind)
        lse = lse_ref[0] - _by_mean_key(query_ref, key_mean_ref, scale, how)
        weights = jnp.exp2(exponents - lse)
        delta = (d_out.astype(jnp.float32) * out).sum(axis=0, keepdims=True)
        d_scores = (weights * (matmul(value, d_out, 0, 0) - delta)).astype(how.dtype)
        d_value_ref[0, :, here] += matmul(d_out, weights.astype(how.dtype), 1, 1)
        query_sums[...] += matmul(with_ones(key), d_scores, 1, 0)
        key_sums[:, here] += matmul(with_ones(query), d_scores, 1, 1)

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        d_query = query_sums[:dim]
        if not how.centred:  # the rounded d_scores of a query do not sum to exactly 0
            d_query -= key_mean_ref[0] * query_sums[dim : dim + 1]
        d_query_ref[0] = d_query

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        d_key = key_sums[:dim, here]
        if how.centred:
            d_key += query_mean_ref[0] * key_sums[dim : dim + 1, here]
        d_key_ref[0, :, here] = d_key


def _behind(first_ref: Any, query_ref: Any, key_ref: Any) -> jax.Array:
    """The position of the tile's first key minus that of its first query."""
    first_key = first_ref[0, 0] + pl.program_id(2) * key_ref.shape[2]
    return first_key - pl.program_id(1) * query_ref.shape[2]
