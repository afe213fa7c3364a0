"""The common parts of the kernels for TPUs: the layout, the grid, and products in a tile.

Arrays are [batch * heads, dim, length]. The length lies along the lanes, so that small head_dims
waste none; XLA chooses this layout for such arrays by itself. One side of the scores, queries or
keys, stays while the other passes by. A program computes a tile of scores in VMEM, [rows of what
stays, rows of what passes by]. Gradients for both sides take one pass over the tiles: the gradients
of what stays are kept in VMEM, in parts if it is long.

The kernels choose the precision, as in gaussian_gpu, so that both sides of each difference are
computed from the same rounded numbers. bfloat16 arrays are multiplied as they are, which is exact.
Other arrays are centred and rounded to bfloat16, in which a TPU multiplies by default. If
jax.default_matmul_precision asks for more than its default, they are multiplied in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from skyformer_jax.attention.kernel_inputs import takes_one_pass, varying_alike

LANES = 128
# The maximum number of rows that stay at a time, and that of rows of a tile along both sides. All
# products of a tile are unrolled: larger tiles are faster, but take long to compile if a product
# takes several passes.
PART = 8192
_TILE, _TILE_OF_LONG_PRODUCTS = 1024, 512
ONES = 16  # rows of ones in with_ones; dims are padded to multiples of it because of bfloat16
_VMEM = 96 * 2**20


class Operands(NamedTuple):
    """How a kernel's points are converted to operands of its products.

    Attributes:
      dtype: the operands' dtype.
      centred: whether points are centred before they are converted to it.
    """

    dtype: Any
    centred: bool


class Sizes(NamedTuple):
    """How a length is divided.

    Attributes:
      length: the padded length.
      part: the number of rows that stay at a time.
      tile: the number of rows of a program's tile.
    """

    length: int
    part: int
    tile: int


def operands(*arrays: jax.Array) -> Operands:
    """Returns how these arrays are converted to operands of products."""
    exact = all(x.dtype == jnp.bfloat16 for x in arrays)
    dtype = jnp.bfloat16 if exact or takes_one_pass() else jnp.float32
    return Operands(dtype, not exact)


def most_rows(how: Operands, *arrays: jax.Array) -> int:
    """Returns the maximum number of rows of a tile for arrays [batch, length, heads, dim]."""
    short = how.dtype == jnp.bfloat16 and all(x.shape[3] <= LANES for x in arrays)
    return _TILE if short else _TILE_OF_LONG_PRODUCTS


def up(size: int, multiple: int) -> int:
    """Rounds size up to a positive multiple of `multiple`."""
    return max(1, -(-size // multiple)) * multiple


def sizes(length: int, tile: int, part: int | None = None) -> Sizes:
    """Divides a length into tiles of about equal size, at most `tile`, and equal parts of tiles."""
    num_tiles = up(length, tile) // tile
    tile = up(-(-length // num_tiles), LANES)
    num_parts = 1 if part is None else up(num_tiles * tile, part) // part
    tiles_of_part = -(-num_tiles // num_parts)
    return Sizes(num_parts * tiles_of_part * tile, tiles_of_part * tile, tile)


def columns(x: jax.Array, length: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch * heads, dim, length], padded with zeros."""
    batch, rows, heads, dim = x.shape
    x = jnp.transpose(x, (0, 2, 3, 1)).reshape(batch * heads, dim, rows)
    return jnp.pad(x, ((0, 0), (0, up(dim, ONES) - dim), (0, length - rows)))


def rows(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of columns: removes the padding and returns an array of the given shape."""
    _, length, heads, dim = shape
    x = x[:, :dim, :length].reshape(-1, heads, dim, length)
    return jnp.transpose(x, (0, 3, 1, 2))


def by_tiles(
    kernel: Callable[..., None],
    constants: Sequence[jax.Array],
    passing: Sequence[jax.Array],
    staying: Sequence[jax.Array],
    of_x: Sequence[int],
    of_y: Sequence[int],
    *,
    x: Sizes,
    y: Sizes,
    sums: Sequence[tuple[int, int]],
    contracted: Sequence[int],
    produced: Sequence[int],
    how: Operands,
    name: str,
    interpret: bool,
) -> list[jax.Array]:
    """Calls a kernel for every tile of x, which passes by, and y, which stays; y varies fastest.

    Args:
      kernel: takes references to the index of the first row of y that stays, int32 [1, 1]; to all
        arrays, in the order of the arguments here; to the results; and to the sums.
      constants: first a number, [1, 1], then arrays [batch * heads, any, 1] with a column per head.
      passing: arrays [batch * heads, any, x.length].
      staying: arrays [batch * heads or a divisor, any, y.length].
      of_x: the dim of each result along x, which the kernel accumulates over the tiles of y.
      of_y: the dim of each result along y, which the kernel accumulates over the tiles of x.
      x: how x is divided.
      y: how y is divided.
      sums: shapes of float32 scratch arrays in VMEM.
      contracted: for each product that yields a tile, the dim over which it sums.
      produced: for each product of a tile with points or values, the dim of its result.
      how: how points are converted to operands, for the cost estimate.
      name: the kernel's name.
      interpret: runs the kernel in Pallas's interpret mode.

    Returns:
      float32 [batch * heads, dim, length] for each result.
    """
    size = passing[0].shape[0]
    first = jnp.zeros((1, 1), jnp.int32)
    inputs = varying_alike([first, *constants, *passing, *staying])
    num_staying = len(staying)

    def spec(array: Any, rows: int, at: Callable[..., Any]) -> pl.BlockSpec:
        shared = size // array.shape[0]
        return pl.BlockSpec(
            (1, array.shape[1], rows),
            lambda n, i, j: (jax.lax.div(n, np.int32(shared)), 0, at(i, j)),
        )

    def result(dim: int, length: int) -> jax.ShapeDtypeStruct:
        varying = jax.typeof(inputs[0]).manual_axis_type
        return jax.ShapeDtypeStruct((size, dim, length), jnp.float32, manual_axis_type=varying)

    def along_x(array: Any) -> pl.BlockSpec:
        return spec(array, x.tile, lambda i, j: i)

    results_of_x = [result(dim, x.length) for dim in of_x]
    results_of_y = [result(dim, y.part) for dim in of_y]
    results = [*results_of_x, *results_of_y]
    call = pl.pallas_call(
        kernel,
        grid=(size, x.length // x.tile, y.part // y.tile),
        in_specs=[
            pl.BlockSpec((1, 1), lambda n, i, j: (0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1), lambda n, i, j: (0, 0)),
            *(spec(array, 1, lambda i, j: 0) for array in constants[1:]),
            *map(along_x, passing),
            *(spec(array, y.tile, lambda i, j: j) for array in staying),
        ],
        out_specs=[
            *map(along_x, results_of_x),
            *(spec(array, y.part, lambda i, j: 0) for array in results_of_y),
        ],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=_cost(
            [*constants, *passing], staying, results, x, y, contracted, produced, how
        ),
        interpret=interpret,
        name=name,
    )
    if y.part == y.length:
        return call(*inputs)

    def one_part(carry: tuple[Any, Any], part: Sequence[jax.Array]) -> tuple[Any, Any]:
        first, total = carry
        found = call(first, *inputs[1:-num_staying], *part)
        added = [a + b for a, b in zip(total, found, strict=False)]
        return (first + y.part, added), found[len(of_x) :]

    def parts(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(*array.shape[:2], -1, y.part), 2, 0)

    zeros = varying_alike([inputs[0], *(jnp.zeros(r.shape, r.dtype) for r in results_of_x)])[1:]
    (_, found_x), found_y = jax.lax.scan(
        one_part, (inputs[0], zeros), [parts(a) for a in inputs[-num_staying:]]
    )
    found_y = [jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1) for a in found_y]
    return [*found_x, *found_y]


def _cost(
    constants_and_passing: Sequence[jax.Array],
    staying: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    x: Sizes,
    y: Sizes,
    contracted: Sequence[int],
    produced: Sequence[int],
    how: Operands,
) -> pl.CostEstimate:
    """Estimates the kernel's cost for XLA: matrix unit operations, exponentials, bytes moved.

    The matrix unit sums over 128 numbers at a time, whatever the dim, and takes six passes for
    float32.
    """
    scores = results[0].shape[0] * x.length * y.part
    rows = sum(up(dim, LANES) for dim in contracted) + sum(produced)
    passes = 6 if how.dtype == jnp.float32 else 1
    turns = x.length // x.tile if y.part > y.tile else 1
    part = y.part / y.length
    return pl.CostEstimate(
        flops=2 * passes * scores * rows,
        transcendentals=scores,
        bytes_accessed=sum(a.nbytes for a in constants_and_passing)
        + int(sum(a.nbytes for a in staying) * part * turns)
        + sum(4 * math.prod(r.shape) for r in results),
    )


def matmul(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Multiplies a and b, contracting one axis of each, in one pass of bfloat16 or in float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def points(ref: Any, centre_ref: Any, how: Operands) -> jax.Array:
    """Returns points [dim, rows], converted to operands."""
    if not how.centred:
        return ref[0]
    return (ref[0].astype(jnp.float32) - centre_ref[0]).astype(how.dtype)


def column(row: jax.Array) -> jax.Array:
    """[1, length] -> [length, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def with_ones(x: jax.Array) -> jax.Array:
    """Appends rows of ones to x, [dim, length], so that a product with it also sums, at no cost."""
    ones = jnp.ones((ONES, x.shape[1]), x.dtype)
    return jnp.concatenate([x, ones], axis=0)


def add(ref: Any, at: tuple[Any, ...], x: jax.Array, is_first: jax.Array) -> None:
    """Adds x to ref[at], or sets ref[at] to x if this is the first term."""

    @pl.when(is_first)
    def _() -> None:
        ref[at] = x

    @pl.when(jnp.logical_not(is_first))
    def _() -> None:
        ref[at] += x
