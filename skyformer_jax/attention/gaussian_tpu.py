"""The Gaussian primitive as Pallas kernels for TPUs, through Mosaic.

Arrays are [batch * heads, dim, length] here: lengths lie along the lanes, so that small head_dims
waste none, and XLA lays such arrays out so by itself. A program computes a tile of scores in VMEM.
The gradients take one pass over the tiles: the shorter of queries and keys stays in VMEM, in parts
if it is long, with its gradients, while the longer passes by.

Precision is chosen here, as in gaussian_gpu, so that both sides of each difference are taken of the
same rounded numbers. bfloat16 arrays are multiplied as they are, which is exact. Others are centred
and rounded to bfloat16, in which a TPU multiplies by default; or, where
jax.default_matmul_precision asks for more than its default, multiplied in float32. W 1 is a row of
the same product as W k: a row of ones stands below k.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from skyformer_jax.attention.kernel_inputs import (
    LOG2E,
    mean_of_keys,
    takes_one_pass,
    varying_alike,
)

# Rows of a tile along what passes by and along what stays, and the most that stay at a time.
_PASSING, _STAYING, _PART = 1024, 512, 8192
_LANES = 128
_VMEM = 96 * 2**20


def tpu_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """G(query, key) value; arguments and result as those of gaussian_gpu.gpu_value."""
    precision = _precision(query, key, value)
    num_queries, num_keys = (min(_PASSING, _up(x.shape[1], _LANES)) for x in (query, key))
    arrays = [
        _columns(query, num_queries),
        _columns(key, num_keys),
        _columns(value, num_keys),
    ]
    size, dim, length = arrays[0].shape
    value_dim, key_blocks = arrays[2].shape[1], arrays[1].shape[2] // num_keys

    def blocks(dim: int, rows: int, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, dim, rows), lambda *at: (at[0], 0, at[axis]))

    inputs = varying_alike([*_constants(scale, key), *arrays])
    out = pl.pallas_call(
        functools.partial(_value_kernel, **precision),
        grid=(size, length // num_queries, key_blocks),
        in_specs=[
            *_constant_specs(dim),
            blocks(dim, num_queries, 1),
            blocks(dim, num_keys, 2),
            blocks(value_dim, num_keys, 2),
        ],
        out_specs=blocks(value_dim, num_queries, 1),
        out_shape=_like(inputs, (size, value_dim, length)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="gaussian",
    )(*inputs)
    return _rows(out, query.shape[1], query.shape[2], value.shape[-1])


def tpu_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of (tpu_value(query, key, value, scale) * d_out).sum().

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    precision = _precision(query, key, value)
    keys_stay = key.shape[1] <= query.shape[1]
    (x, of_x), (y, of_y) = ((query, d_out), (key, value))[:: 1 if keys_stay else -1]
    num_x, num_y = (
        min(limit, _up(z.shape[1], _LANES)) for limit, z in ((_PASSING, x), (_STAYING, y))
    )
    part = min(_PART, _up(y.shape[1], num_y))
    passing = [_columns(z, num_x) for z in (x, of_x)]
    staying = [_columns(z, part) for z in (y, of_y)]
    size, dim, length = passing[0].shape
    value_dim, parts = staying[1].shape[1], staying[0].shape[2] // part
    rows = dim + 16  # and those of ones

    def passes(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, dim, num_x), lambda n, p, i, j: (n, 0, i))

    def passed(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, dim, num_x), lambda n, p, i, j: (p, n, 0, i))

    def tile(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, dim, num_y), lambda n, p, i, j: (n, 0, p * (part // num_y) + j))

    def stays(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, dim, part), lambda n, p, i, j: (n, 0, p))

    inputs = varying_alike([*_constants(scale, key), *passing, *staying])
    at_values = (stays if keys_stay else passed)(value_dim)
    shape_of_values = (size, value_dim, parts * part)
    d_x, d_y, d_value = pl.pallas_call(
        functools.partial(_gradients_kernel, keys_stay=keys_stay, **precision),
        grid=(size, parts, length // num_x, part // num_y),
        in_specs=[
            *_constant_specs(dim),
            passes(dim),
            passes(value_dim),
            tile(dim),
            tile(value_dim),
        ],
        out_specs=[passed(dim), stays(dim), at_values],
        out_shape=[
            _like(inputs, (parts, size, dim, length)),
            _like(inputs, (size, dim, parts * part)),
            _like(inputs, shape_of_values if keys_stay else (parts, size, value_dim, length)),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, num_x), jnp.float32),
            pltpu.VMEM((rows, part), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="gaussian_gradients",
    )(*inputs)
    d_x = d_x.sum(axis=0)
    d_value = d_value if keys_stay else d_value.sum(axis=0)
    d_query, d_key = (d_x, d_y) if keys_stay else (d_y, d_x)
    heads = query.shape[2]
    return (
        scale * _rows(d_query, query.shape[1], heads, query.shape[-1]),
        scale * _rows(d_key, key.shape[1], heads, key.shape[-1]),
        _rows(d_value, key.shape[1], heads, value.shape[-1]),
    )


def _precision(*arrays: jax.Array) -> dict[str, Any]:
    """The dtype of the products' operands, and whether points are centred before they have it."""
    exact = all(x.dtype == jnp.bfloat16 for x in arrays)
    dtype = jnp.bfloat16 if exact or takes_one_pass() else jnp.float32
    return {"dtype": dtype, "centred": not exact}


def _up(size: int, multiple: int) -> int:
    return max(1, -(-size // multiple)) * multiple


def _columns(x: jax.Array, multiple: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch * heads, dim, length], filled up with zeros."""
    batch, length, heads, dim = x.shape
    x = jnp.transpose(x, (0, 2, 3, 1)).reshape(batch * heads, dim, length)
    missing = _up(dim, 16) - dim, _up(length, multiple) - length
    return jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1])))


def _rows(x: jax.Array, length: int, heads: int, dim: int) -> jax.Array:
    """The other way round, without what was filled up."""
    x = x[:, :dim, :length].reshape(-1, heads, dim, length)
    return jnp.transpose(x, (0, 3, 1, 2))


def _constants(scale: jax.Array, key: jax.Array) -> list[jax.Array]:
    """The scale times log2(e) as [1, 1], and the centre as [batch * heads, dim, 1]."""
    centre = mean_of_keys(key)
    batch, _, heads, dim = centre.shape
    centre = jnp.pad(centre, ((0, 0), (0, 0), (0, 0), (0, _up(dim, 16) - dim)))
    return [(scale * LOG2E).reshape(1, 1), centre.reshape(batch * heads, -1, 1)]


def _constant_specs(dim: int) -> list[pl.BlockSpec]:
    return [
        pl.BlockSpec((1, 1), lambda *at: (0, 0)),
        pl.BlockSpec((1, dim, 1), lambda *at: (at[0], 0, 0)),
    ]


def _like(inputs: list[jax.Array], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    varying = jax.typeof(inputs[0]).manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)


def _matmul(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """The product over an axis of each, in one pass of bfloat16 or in float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _points(ref: Any, centre_ref: Any, dtype: Any, centred: bool) -> jax.Array:
    """Queries or keys [dim, rows], as the products take them."""
    if not centred:
        return ref[0]
    return (ref[0].astype(jnp.float32) - centre_ref[0]).astype(dtype)


def _scores(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
    """[rows of y, rows of x], of points [dim, rows]."""
    x_float, y_float = x.astype(jnp.float32), y.astype(jnp.float32)
    x_norms = 0.5 * (x_float * x_float).sum(axis=0, keepdims=True)
    # As a column, which the matrix unit gives.
    ones = jnp.ones((y.shape[0], 1), jnp.float32)
    y_norms = _matmul(0.5 * y_float * y_float, ones, 0, 0)
    exponent = scale * (_matmul(y, x, 0, 0) - (x_norms + y_norms))
    return jnp.exp2(jnp.minimum(exponent, 0))  # rounding alone can make it positive


def _value_kernel(
    scale_ref: Any, centre_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any,
    *, dtype: Any, centred: bool,
) -> None:  # fmt: skip
    query, key = (_points(ref, centre_ref, dtype, centred) for ref in (query_ref, key_ref))
    scores = _scores(query, key, scale_ref[...]).astype(dtype)
    _add(out_ref, (0,), _matmul(value_ref[0].astype(dtype), scores, 1, 0), pl.program_id(2) == 0)


def _add(ref: Any, at: tuple[Any, ...], x: jax.Array, is_first: jax.Array) -> None:
    """Adds to what has been added before, if this is not the first."""

    @pl.when(is_first)
    def _() -> None:
        ref[at] = x

    @pl.when(jnp.logical_not(is_first))
    def _() -> None:
        ref[at] += x


def _gradients_kernel(
    scale_ref: Any, centre_ref: Any, x_ref: Any, of_x_ref: Any, y_ref: Any, of_y_ref: Any,
    d_x_ref: Any, d_y_ref: Any, d_value_ref: Any, x_sums: Any, y_sums: Any,
    *, dtype: Any, centred: bool, keys_stay: bool,
) -> None:  # fmt: skip
    """W y - (W 1) x for what passes, W^T x - (W^T 1) y for what stays, and S^T d_out.

    Of x are d_out, and of y values, if keys stay; otherwise the other way round.
    """
    i, j = pl.program_id(2), pl.program_id(3)
    is_first_x, is_first_y = i == 0, j == 0
    x, y = (_points(ref, centre_ref, dtype, centred) for ref in (x_ref, y_ref))
    of_x, of_y = of_x_ref[0].astype(dtype), of_y_ref[0].astype(dtype)
    dim, num_y = y.shape
    here = pl.ds(pl.multiple_of(j * num_y, _LANES), num_y)

    scores = _scores(x, y, scale_ref[...])
    w = (scores * _matmul(of_y, of_x, 0, 0)).astype(dtype)
    scores = scores.astype(dtype)
    if keys_stay:
        _add(d_value_ref, (0, slice(None), here), _matmul(of_x, scores, 1, 1), is_first_x)
    else:
        _add(d_value_ref, (0,), _matmul(of_y, scores, 1, 0), is_first_y)

    def with_ones(points: jax.Array) -> jax.Array:
        ones = jnp.ones((y_sums.shape[0] - dim, points.shape[1]), points.dtype)
        return jnp.concatenate([points, ones], axis=0)

    _add(x_sums, (slice(None),), _matmul(with_ones(y), w, 1, 0), is_first_y)
    _add(y_sums, (slice(None), here), _matmul(with_ones(x), w, 1, 1), is_first_x)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        d_x_ref[0] = x_sums[:dim] - x_sums[dim : dim + 1] * x.astype(jnp.float32)

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        d_y_ref[0, :, here] = y_sums[:dim, here] - y_sums[dim : dim + 1, here] * y.astype(
            jnp.float32
        )
