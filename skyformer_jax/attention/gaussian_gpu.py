"""The Gaussian primitive as Pallas kernels for NVIDIA GPUs, through Triton.

A program computes a block of rows of a result and passes over the other side in blocks of columns,
so that scores live in registers only. Arrays stay [batch, length, heads, head_dim]. Nothing
normalises the sum over the columns: where the rows alone would not fill the device, the columns are
split, and the results of the parts are added.

Precision is chosen here and not left to the compiler. The exponent is a difference of products and
norms, and the gradients are differences W k - (W 1) q, so both sides of each are taken of the same
rounded numbers:

- bfloat16 arrays are multiplied as they are, which is exact; scores and W are rounded to bfloat16.
- Other arrays are centred, x - c with c the mean of the keys, which changes no distance, and then
  rounded to TF32, whose mantissa has ten bits, as are scores and W. Where
  jax.default_matmul_precision asks for more than its default, each is split into two such numbers
  and multiplied in three passes, which is float32 but for its last bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from skyformer_jax.attention.kernel_inputs import (
    LOG2E,
    mean_of_keys,
    takes_one_pass,
    varying_alike,
)

# Programs that fill a device: two for each multiprocessor of an H100.
_PROGRAMS = 264


def gpu_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """G(query, key) value.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, value_dim].
      scale: float32 scalar, the kernel's inverse squared width.
      interpret: runs the kernel operation by operation, on any platform.

    Returns:
      float32 [batch, q_length, heads, value_dim].
    """
    run = _runner(query, key, value, scale, interpret)
    (out,) = run(_value_kernel, "gaussian", (query,), (key, value), value.shape[-1:])
    return out


def gpu_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of (gpu_value(query, key, value, scale) * d_out).sum().

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    run = _runner(query, key, value, scale, interpret)
    dims = query.shape[-1], value.shape[-1]
    rows, columns = (query, d_out), (key, value)
    (d_query,) = run(_query_gradient_kernel, "gaussian_dq", rows, columns, dims[:1])
    d_key, d_value = run(_key_gradients_kernel, "gaussian_dkv", columns, rows, dims)
    return scale * d_query, scale * d_key, d_value


def _runner(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: jax.Array, interpret: bool
) -> Callable[..., list[jax.Array]]:
    """_run for a problem: with its scale, its centre and its precision."""
    if all(x.dtype == jnp.bfloat16 for x in (query, key, value)):
        passes, dtype, centre = 1, jnp.bfloat16, jnp.zeros_like(key[:, :1], jnp.float32)
    else:
        passes = 1 if takes_one_pass() else 3
        dtype, centre = jnp.float32, mean_of_keys(key)
    return functools.partial(
        _run, scale=scale, centre=centre, dtype=dtype, passes=passes, interpret=interpret
    )


def _run(
    kernel: Callable[..., None],
    name: str,
    rows: tuple[jax.Array, ...],
    columns: tuple[jax.Array, ...],
    out_dims: tuple[int, ...],
    *,
    scale: jax.Array,
    centre: jax.Array,
    dtype: Any,
    passes: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over all blocks of rows and all parts of the columns.

    Args:
      kernel: takes references to scale, centre, each of rows and columns, and each output.
      name: of the kernel, for profiles.
      rows: [batch, length, heads, dim] of one length: the points, and what belongs to them.
      columns: likewise, of another length.
      out_dims: the last dimension of each output.
      scale: float32 scalar.
      centre: float32 [batch, 1, heads, head_dim].
      dtype: of the products' operands.
      passes: of a product of float32 operands.
      interpret: see gpu_value.

    Returns:
      float32 [batch, length of rows, heads, dim], an output for each of out_dims.
    """
    batch, length, heads, _ = rows[0].shape
    dims = [_power_of_2(x.shape[-1]) for x in (*rows, *columns)]
    row_limit, column_limit, num_warps = _blocks(max(dims), dtype, passes)
    num_rows = min(row_limit, _power_of_2(length))
    num_columns = min(column_limit, _power_of_2(columns[0].shape[1]))
    row_blocks, column_blocks = -(-length // num_rows), -(-columns[0].shape[1] // num_columns)
    parts = min(column_blocks, _power_of_2(_PROGRAMS // (row_blocks * batch * heads), least=1))
    turns = -(-column_blocks // parts)
    parts = -(-column_blocks // turns)

    def padded(x: jax.Array, length: int) -> jax.Array:
        """Zeros of value and of d_out add nothing; of the points nothing is then used."""
        missing = length - x.shape[1], _power_of_2(x.shape[-1]) - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))

    def blocks(rows: int, dim: int, index: Callable[..., Any]) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, None, dim), index)

    row_specs = [
        blocks(num_rows, _power_of_2(x.shape[-1]), lambda i, s, n: (n // heads, i, n % heads, 0))
        for x in rows
    ]
    part_specs = [
        blocks(
            turns * num_columns,
            _power_of_2(x.shape[-1]),
            lambda i, s, n: (n // heads, s, n % heads, 0),
        )
        for x in columns
    ]
    arrays = [scale.reshape(1), padded(centre, 1)]
    arrays += [padded(x, row_blocks * num_rows) for x in rows]
    arrays += [padded(x, parts * turns * num_columns) for x in columns]
    arrays = varying_alike(arrays)
    outs = pl.pallas_call(
        functools.partial(kernel, num_columns=num_columns, turns=turns, dtype=dtype, passes=passes),
        grid=(row_blocks, parts, batch * heads),
        in_specs=[
            pl.BlockSpec((1,), lambda i, s, n: (0,)),
            pl.BlockSpec(
                (None, None, None, dims[0]), lambda i, s, n: (n // heads, 0, n % heads, 0)
            ),
            *row_specs,
            *part_specs,
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, num_rows, None, _power_of_2(dim)),
                lambda i, s, n: (s, n // heads, i, n % heads, 0),
            )
            for dim in out_dims
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (parts, batch, row_blocks * num_rows, heads, _power_of_2(dim)),
                jnp.float32,
                manual_axis_type=jax.typeof(arrays[0]).manual_axis_type,
            )
            for dim in out_dims
        ],
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*arrays)
    return [out.sum(axis=0)[:, :length, :, :dim] for out, dim in zip(outs, out_dims, strict=True)]


def _power_of_2(size: int, least: int = 16) -> int:
    """The least power of two that is not below size, nor below least, as Triton wants blocks."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def _blocks(dim: int, dtype: Any, passes: int) -> tuple[int, int, int]:
    """The most rows and columns of a tile of scores, and warps that share it.

    As many as fit the registers, by what the compiler says for sm_90.
    """
    wide = max(64, _power_of_2(dim))
    if dtype == jnp.bfloat16:
        return {64: (64, 64, 4), 128: (64, 64, 4)}.get(wide, (64, 32, 8))
    if passes == 1:
        return {64: (64, 64, 4), 128: (64, 32, 8)}.get(wide, (32, 16, 8))
    return {64: (64, 32, 4), 128: (32, 16, 8)}.get(wide, (16, 16, 4))


def _tf32(x: jax.Array) -> jax.Array:
    """Rounded to ten bits of mantissa, by Veltkamp's splitting."""
    shifted = x * 8193.0  # 2**13 + 1
    return shifted - (shifted - x)


def _points(block: jax.Array, centre: jax.Array, dtype: Any, passes: int) -> jax.Array:
    """Queries or keys as the products take them."""
    if dtype == jnp.bfloat16:
        return block
    return _operand(block.astype(dtype) - centre[None, :], dtype, passes)


def _operand(block: jax.Array, dtype: Any, passes: int) -> jax.Array:
    """Rounded as the products round, but where they take more than one pass."""
    block = block.astype(dtype)
    return block if dtype == jnp.bfloat16 or passes > 1 else _tf32(block)


def _matmul(a: jax.Array, b: jax.Array, passes: int) -> jax.Array:
    """A product of operands; float32 ones are multiplied as TF32, in one pass or three."""
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    if passes == 1:
        return dot(a, b)
    a_high, b_high = _tf32(a), _tf32(b)
    return dot(a - a_high, b_high) + dot(a_high, b - b_high) + dot(a_high, b_high)


def _scores(rows: jax.Array, columns: jax.Array, scale: jax.Array, passes: int) -> jax.Array:
    """exp(-scale/2 ||x - y||^2) for rows x and columns y."""

    def half_norms(points: jax.Array) -> jax.Array:
        points = points.astype(jnp.float32)
        return 0.5 * (points * points).sum(axis=1)

    norms = half_norms(rows)[:, None] + half_norms(columns)[None, :]
    exponent = (scale * LOG2E) * (_matmul(rows, columns.T, passes) - norms)
    return jnp.exp2(jnp.minimum(exponent, 0))  # rounding alone can make it positive


def _value_kernel(
    scale_ref: Any,
    centre_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    out_ref: Any,
    *,
    num_columns: int,
    turns: int,
    dtype: Any,
    passes: int,
) -> None:
    scale, centre = scale_ref[0], centre_ref[...]
    query = _points(query_ref[...], centre, dtype, passes)

    def turn(j: jax.Array, out: jax.Array) -> jax.Array:
        here = pl.ds(j * num_columns, num_columns)
        key = _points(key_ref[here, :], centre, dtype, passes)
        value = _operand(value_ref[here, :], dtype, passes)
        scores = _operand(_scores(query, key, scale, passes), dtype, passes)
        return out + _matmul(scores, value, passes)

    out_ref[...] = jax.lax.fori_loop(0, turns, turn, jnp.zeros(out_ref.shape, jnp.float32))


def _query_gradient_kernel(
    scale_ref: Any,
    centre_ref: Any,
    query_ref: Any,
    d_out_ref: Any,
    key_ref: Any,
    value_ref: Any,
    d_query_ref: Any,
    *,
    num_columns: int,
    turns: int,
    dtype: Any,
    passes: int,
) -> None:
    """W k - (W 1) q, with W = S * (d_out v^T)."""
    scale, centre = scale_ref[0], centre_ref[...]
    query = _points(query_ref[...], centre, dtype, passes)
    d_out = _operand(d_out_ref[...], dtype, passes)

    def turn(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w_key, sums = carry
        here = pl.ds(j * num_columns, num_columns)
        key = _points(key_ref[here, :], centre, dtype, passes)
        value = _operand(value_ref[here, :], dtype, passes)
        w = _scores(query, key, scale, passes) * _matmul(d_out, value.T, passes)
        w = _operand(w, dtype, passes)
        return w_key + _matmul(w, key, passes), sums + w.astype(jnp.float32).sum(axis=1)

    rows, dim = d_query_ref.shape
    zeros = jnp.zeros((rows, dim), jnp.float32), jnp.zeros((rows,), jnp.float32)
    w_key, sums = jax.lax.fori_loop(0, turns, turn, zeros)
    d_query_ref[...] = w_key - sums[:, None] * query.astype(jnp.float32)


def _key_gradients_kernel(
    scale_ref: Any,
    centre_ref: Any,
    key_ref: Any,
    value_ref: Any,
    query_ref: Any,
    d_out_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    num_columns: int,
    turns: int,
    dtype: Any,
    passes: int,
) -> None:
    """W^T q - (W^T 1) k and S^T d_out; keys are the rows here, and queries the columns."""
    scale, centre = scale_ref[0], centre_ref[...]
    key = _points(key_ref[...], centre, dtype, passes)
    value = _operand(value_ref[...], dtype, passes)

    def turn(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w_query, sums, d_value = carry
        here = pl.ds(i * num_columns, num_columns)
        query = _points(query_ref[here, :], centre, dtype, passes)
        d_out = _operand(d_out_ref[here, :], dtype, passes)
        scores = _scores(key, query, scale, passes)
        w = _operand(scores * _matmul(value, d_out.T, passes), dtype, passes)
        scores = _operand(scores, dtype, passes)
        return (
            w_query + _matmul(w, query, passes),
            sums + w.astype(jnp.float32).sum(axis=1),
            d_value + _matmul(scores, d_out, passes),
        )

    zeros = (
        jnp.zeros(d_key_ref.shape, jnp.float32),
        jnp.zeros(d_key_ref.shape[:1], jnp.float32),
        jnp.zeros(d_value_ref.shape, jnp.float32),
    )
    w_query, sums, d_value = jax.lax.fori_loop(0, turns, turn, zeros)
    d_key_ref[...] = w_query - sums[:, None] * key.astype(jnp.float32)
    d_value_ref[...] = d_value
