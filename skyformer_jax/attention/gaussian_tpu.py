"""The Gaussian primitive as Pallas kernels for TPUs, through Mosaic.

See tpu_tiles for the layout, the grid and the precision. W 1 comes from the same product as W k,
because rows of ones are appended to k.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from skyformer_jax.attention import tpu_tiles
from skyformer_jax.attention.kernel_inputs import LOG2E, mean_of_keys
from skyformer_jax.attention.tpu_tiles import (
    Operands,
    add,
    column,
    columns,
    matmul,
    points,
    rows,
    sizes,
    with_ones,
)


def tpu_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes G(query, key) value; arguments and result are those of gaussian_gpu.gpu_value."""
    how = tpu_tiles.operands(query, key, value)
    tile = tpu_tiles.most_rows(how, query, value)
    x, y = sizes(query.shape[1], tile), sizes(key.shape[1], tile)
    passing = columns(query, x.length)
    staying = [columns(z, y.length) for z in (key, value)]
    dim, value_dim = (array.shape[1] for array in staying)
    (out,) = tpu_tiles.by_tiles(
        functools.partial(_value_kernel, how=how),
        _constants(scale, key),
        [passing],
        staying,
        [value_dim],
        [],
        x=x,
        y=y,
        sums=[],
        contracted=[dim],
        produced=[value_dim],
        how=how,
        name="gaussian",
        interpret=interpret,
    )
    return rows(out, (*query.shape[:3], value.shape[3]))


def tpu_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of (tpu_value(query, key, value, scale) * d_out).sum().

    The shorter of queries and keys stays, and the longer passes by.

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    how = tpu_tiles.operands(query, key, value)
    keys_stay = key.shape[1] <= query.shape[1]
    (x, of_x), (y, of_y) = ((query, d_out), (key, value))[:: 1 if keys_stay else -1]
    tile = tpu_tiles.most_rows(how, query, value)
    x_sizes, y_sizes = sizes(x.shape[1], tile), sizes(y.shape[1], tile, tpu_tiles.PART)
    passing = [columns(z, x_sizes.length) for z in (x, of_x)]
    staying = [columns(z, y_sizes.length) for z in (y, of_y)]
    dim, value_dim = (array.shape[1] for array in passing)
    with_values = [dim, value_dim]
    found = tpu_tiles.by_tiles(
        functools.partial(_gradients_kernel, how=how, keys_stay=keys_stay),
        _constants(scale, key),
        passing,
        staying,
        [dim] if keys_stay else with_values,
        with_values if keys_stay else [dim],
        x=x_sizes,
        y=y_sizes,
        sums=[(dim + tpu_tiles.ONES, length) for length in (x_sizes.tile, y_sizes.part)],
        contracted=[dim, value_dim],
        produced=[dim + tpu_tiles.ONES, dim + tpu_tiles.ONES, value_dim],
        how=how,
        name="gaussian_gradients",
        interpret=interpret,
    )
    d_query, d_key, d_value = found if keys_stay else (found[2], found[0], found[1])
    return (
        scale * rows(d_query, query.shape),
        scale * rows(d_key, key.shape),
        rows(d_value, value.shape),
    )


def _constants(scale: jax.Array, key: jax.Array) -> list[jax.Array]:
    """The scale times log2(e) as [1, 1], and the centre as [batch * heads, dim, 1]."""
    return [(scale * LOG2E).reshape(1, 1), columns(mean_of_keys(key), 1)]


def _scores(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
    """Scores [rows of y, rows of x] of points x and y, [dim, rows]."""

    def half_norms(points: jax.Array) -> jax.Array:
        points = points.astype(jnp.float32)
        return 0.5 * (points * points).sum(axis=0, keepdims=True)

    exponent = scale * (matmul(y, x, 0, 0) - (half_norms(x) + column(half_norms(y))))
    return jnp.exp2(jnp.minimum(exponent, 0))  # rounding can make the exponent positive


def _value_kernel(
    first_ref: Any, scale_ref: Any, centre_ref: Any,
    query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any, *, how: Operands
) -> None:  # fmt: skip
    del first_ref
    query, key = (points(ref, centre_ref, how) for ref in (query_ref, key_ref))
    scores = _scores(query, key, scale_ref[...]).astype(how.dtype)
    out = matmul(value_ref[0].astype(how.dtype), scores, 1, 0)
    add(out_ref, (0,), out, pl.program_id(2) == 0)


def _gradients_kernel(
    first_ref: Any, scale_ref: Any, centre_ref: Any,
    x_ref: Any, of_x_ref: Any, y_ref: Any, of_y_ref: Any,
    *results: Any, how: Operands, keys_stay: bool,
) -> None:  # fmt: skip
    """Computes W y - (W 1) x for what passes, W^T x - (W^T 1) y for what stays, and S^T d_out.

    If keys stay, of_x is d_out and of_y holds the values; otherwise it is the other way round.
    """
    del first_ref
    *results, x_sums, y_sums = results  # type: ignore[assignment]
    d_x_ref, d_value_ref, d_y_ref = results if not keys_stay else (results[0], *results[:0:-1])
    i, j = pl.program_id(1), pl.program_id(2)
    is_first_x, is_first_y = i == 0, j == 0
    x, y = (points(ref, centre_ref, how) for ref in (x_ref, y_ref))
    of_x, of_y = (ref[0].astype(how.dtype) for ref in (of_x_ref, of_y_ref))
    dim, num_y = y.shape
    here = pl.ds(pl.multiple_of(j * num_y, tpu_tiles.LANES), num_y)

    scores = _scores(x, y, scale_ref[...])
    w = (scores * matmul(of_y, of_x, 0, 0)).astype(how.dtype)
    scores = scores.astype(how.dtype)
    if keys_stay:
        add(d_value_ref, (0, slice(None), here), matmul(of_x, scores, 1, 1), is_first_x)
    else:
        add(d_value_ref, (0,), matmul(of_y, scores, 1, 0), is_first_y)
    add(x_sums, (slice(None),), matmul(with_ones(y), w, 1, 0), is_first_y)
    add(y_sums, (slice(None), here), matmul(with_ones(x), w, 1, 1), is_first_x)

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        d_x_ref[0] = x_sums[:dim] - x_sums[dim : dim + 1] * x.astype(jnp.float32)

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        of_ones = y_sums[dim : dim + 1, here]
        d_y_ref[0, :, here] = y_sums[:dim, here] - of_ones * y.astype(jnp.float32)
