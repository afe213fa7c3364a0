"""The common parts of the Pallas kernels for NVIDIA GPUs: grids, and the rounding of products.

The kernels compile through Triton. A program computes a block of rows of a result and loops over
the other side in blocks of columns, so that scores exist only in registers. Arrays keep the layout
[batch, length, heads, dim]. If the rows alone would not fill the device, the columns are split into
parts.

The kernels choose the precision and do not leave it to the compiler:

- bfloat16 arrays are multiplied as they are, which is exact; scores and weights are rounded to
  bfloat16.
- Other arrays are rounded to TF32, whose mantissa has ten bits, as are scores and weights. If
  jax.default_matmul_precision asks for more than its default, each number is split into two such
  numbers and multiplied in three passes, which gives float32 except for its last bits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from skyformer_jax.attention.kernel_inputs import takes_one_pass, varying_alike

# Warps that fill a device: eight for each multiprocessor of an H100.
_WARPS = 8 * 132
# The minimum number of column blocks per part. Each part writes a result of its own, which is read
# again; this traffic should be small compared with that of the columns. Axes mapped by jax.vmap add
# further programs, whose number is unknown here.
_LEAST_TURNS = 8


class Precision(NamedTuple):
    """The precision of products.

    Attributes:
      dtype: the operands' dtype, bfloat16 or float32.
      passes: number of TF32 passes in which float32 operands are multiplied, 1 or 3.
    """

    dtype: Any
    passes: int

    @property
    def exact(self) -> bool:
        """Whether the operands are the arrays themselves, neither centred nor rounded."""
        return self.dtype == jnp.bfloat16


def precision_of(*arrays: jax.Array) -> Precision:
    """Returns the precision for these arrays' dtypes and jax.default_matmul_precision."""
    if all(x.dtype == jnp.bfloat16 for x in arrays):
        return Precision(jnp.bfloat16, 1)
    return Precision(jnp.float32, 1 if takes_one_pass() else 3)


def run(
    kernel: Callable[..., None],
    name: str,
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    out_dims: Sequence[int | None],
    *,
    scale: jax.Array,
    centres: Sequence[jax.Array],
    precision: Precision,
    interpret: bool,
    tall: bool = False,
    **options: Any,
) -> list[jax.Array]:
    """Runs a kernel over all blocks of rows and all parts of the columns.

    Lengths are padded with zeros to whole blocks, and dims to powers of two.

    Args:
      kernel: takes references to scale, to each of centres, rows and columns, and to each output.
        Its keyword arguments are num_columns (columns per block), turns (column blocks per part),
        precision and the options.
      name: the kernel's name in profiles.
      rows: arrays [batch, length, heads, dim] or [batch, length, heads], all of one length.
      columns: likewise; their length may differ from that of the rows.
      out_dims: the last dimension of each output; None for an output without it.
      scale: float32 scalar.
      centres: float32 [batch, 1, heads, dim].
      precision: the precision of the products; block sizes depend on it.
      interpret: runs the kernel in Pallas's interpret mode, on any platform.
      tall: doubles the rows of a block if the registers allow it.
      **options: further keyword arguments of the kernel.

    Returns:
      float32 [parts, batch, length of rows, heads, dim] for each of out_dims.
    """
    batch, length, heads = rows[0].shape[:3]
    num_rows, num_columns, row_blocks, parts, turns, num_warps = _grid(
        rows, columns, precision, tall
    )

    def padded(x: jax.Array, length: int) -> jax.Array:
        dims = [(0, _power_of_2(dim) - dim) for dim in x.shape[3:]]
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), *dims))

    arrays = [scale.reshape(1), *(padded(x, 1) for x in centres)]
    arrays += [padded(x, row_blocks * num_rows) for x in rows]
    arrays += [padded(x, parts * turns * num_columns) for x in columns]
    arrays = varying_alike(arrays)
    dims_of_outs = [() if dim is None else (_power_of_2(dim),) for dim in out_dims]
    outs = pl.pallas_call(
        functools.partial(
            kernel, num_columns=num_columns, turns=turns, precision=precision, **options
        ),
        grid=(row_blocks, parts, batch * heads),
        in_specs=[
            pl.BlockSpec((1,), lambda i, s, n: (0,)),
            *(_spec(heads, None, _dims(x), lambda i, s: 0) for x in centres),
            *(_spec(heads, num_rows, _dims(x), lambda i, s: i) for x in rows),
            *(_spec(heads, turns * num_columns, _dims(x), lambda i, s: s) for x in columns),
        ],
        out_specs=[
            _spec(heads, num_rows, dims, lambda i, s: i, of_part=True) for dims in dims_of_outs
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (parts, batch, row_blocks * num_rows, heads, *dims),
                jnp.float32,
                manual_axis_type=jax.typeof(arrays[0]).manual_axis_type,
            )
            for dims in dims_of_outs
        ],
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*arrays)
    return [
        out[:, :, :length] if dim is None else out[:, :, :length, :, :dim]
        for out, dim in zip(outs, out_dims, strict=True)
    ]


def _spec(
    heads: int,
    rows: int | None,
    dims: tuple[int, ...],
    index: Callable[[Any, Any], Any],
    *,
    of_part: bool = False,
) -> pl.BlockSpec:
    """The BlockSpec of row blocks of one example and head in [batch, length, heads, *dims].

    Args:
      heads: number of heads.
      rows: rows per block; None means a single row, without an axis.
      dims: the last dimension, if there is one.
      index: returns the block's index along the length, given the indices of the row block and the
        part.
      of_part: whether the array has a leading axis of parts.
    """

    def place(i: Any, s: Any, n: Any) -> tuple[Any, ...]:
        indices = (n // heads, index(i, s), n % heads, *(0 for _ in dims))
        return (s, *indices) if of_part else indices

    return pl.BlockSpec((*[None] * of_part, None, rows, None, *dims), place)


def _dims(x: jax.Array) -> tuple[int, ...]:
    """The dimensions after [batch, length, heads], padded."""
    return tuple(map(_power_of_2, x.shape[3:]))


def _grid(
    rows: Sequence[jax.Array], columns: Sequence[jax.Array], precision: Precision, tall: bool
) -> tuple[int, int, int, int, int, int]:
    """Rows and columns per block, row blocks, parts, column blocks per part, and warps."""
    batch, length, heads = rows[0].shape[:3]
    dims = [_power_of_2(x.shape[-1]) for x in (*rows, *columns) if x.ndim == 4]
    row_limit, column_limit, num_warps = _blocks(max(dims), precision, tall)
    num_rows = min(row_limit, _power_of_2(length))
    num_columns = min(column_limit, _power_of_2(columns[0].shape[1]))
    row_blocks, column_blocks = -(-length // num_rows), -(-columns[0].shape[1] // num_columns)
    wanted = _power_of_2(_WARPS // (num_warps * row_blocks * batch * heads), least=1)
    turns = -(-column_blocks // max(1, min(column_blocks // _LEAST_TURNS, wanted)))
    return num_rows, num_columns, row_blocks, -(-column_blocks // turns), turns, num_warps


def _power_of_2(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least size and `least`, as Triton requires of blocks."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def _blocks(dim: int, precision: Precision, tall: bool) -> tuple[int, int, int]:
    """The maximum rows and columns of a tile of scores, and the number of warps that share it.

    The tile is as large as fits the registers, according to the compiler's report for sm_90. Tall
    blocks read the columns half as often, with twice the warps.
    """
    wide = max(64, _power_of_2(dim))
    if precision.exact and tall and wide <= 128:
        return 128, 64, 8
    if precision.exact:
        return {64: (64, 64, 4), 128: (64, 64, 4)}.get(wide, (64, 32, 8))
    if precision.passes == 1 and tall and wide == 64:
        return 128, 64, 8
    if precision.passes == 1:
        return {64: (64, 64, 4), 128: (64, 32, 8)}.get(wide, (32, 16, 8))
    return {64: (64, 32, 4), 128: (32, 16, 8)}.get(wide, (16, 16, 4))


def _tf32(x: jax.Array) -> jax.Array:
    """Rounds to ten bits of mantissa by Veltkamp's splitting."""
    shifted = x * 8193.0  # 2**13 + 1
    return shifted - (shifted - x)


def centred(block: jax.Array, centre: jax.Array, precision: Precision) -> jax.Array:
    """Prepares rows for products: subtracts the centre and rounds, or leaves bfloat16 as it is."""
    if precision.exact:
        return block
    return operand(block.astype(precision.dtype) - centre[None, :], precision)


def operand(block: jax.Array, precision: Precision) -> jax.Array:
    """Rounds a block to the precision of the products, unless these take several passes."""
    block = block.astype(precision.dtype)
    return block if precision.exact or precision.passes > 1 else _tf32(block)


def matmul(a: jax.Array, b: jax.Array, precision: Precision) -> jax.Array:
    """Multiplies operands; float32 ones are multiplied as TF32, in one pass or three."""
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    if precision.passes == 1:
        return dot(a, b)
    a_high, b_high = _tf32(a), _tf32(b)
    return dot(a - a_high, b_high) + dot(a_high, b - b_high) + dot(a_high, b_high)
