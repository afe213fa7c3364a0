"""What the kernels for TPUs have in common: the layout, the grid, and products in a tile.

Arrays are [batch * heads, dim, length] here: lengths lie along the lanes, so that small head_dims
waste none, and XLA lays such arrays out so by itself. A program computes a tile of scores in VMEM,
[rows of what stays, rows of what passes by]. With gradients for both sides it takes one pass over
the tiles: what stays has its gradients in VMEM, in parts if it is long.

Precision is chosen here, as in gaussian_gpu, so that both sides of each difference are taken of the
same rounded numbers. bfloat16 arrays are multiplied as they are, which is exact. Others are centred
and rounded to bfloat16, in which a TPU multiplies by default; or, where
jax.default_matmul_precision asks for more than its default, multiplied in float32.
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
# The most rows that stay at a time; and those of a tile along both sides, of which all products are
# unrolled: larger ones are faster, and take long to compile where a product takes several passes.
PART = 8192
_TILE, _TILE_OF_LONG_PRODUCTS = 1024, 512
ONES = 16  # rows of ones in with_ones; and what dims are multiples of, for bfloat16's sake
_VMEM = 96 * 2**20


class Operands(NamedTuple):
    """How the points of a kernel become operands of its products.

    Attributes:
      dtype: the operands' dtype.
      centred: whether points are centred before they have it.
    """

    dtype: Any
    centred: bool


class Sizes(NamedTuple):
    """How an axis of lengths is divided.

    Attributes:
      length: with what is filled up.
      part: what stays at a time.
      tile: the tile of a program.
    """

    length: int
    part: int
    tile: int


def operands(*arrays: jax.Array) -> Operands:
    """The operands of products of these arrays."""
    exact = all(x.dtype == jnp.bfloat16 for x in arrays)
    dtype = jnp.bfloat16 if exact or takes_one_pass() else jnp.float32
    return Operands(dtype, not exact)


def most_rows(how: Operands, *arrays: jax.Array) -> int:
    """The most rows of a tile for arrays [batch, length, heads, dim]."""
    short = how.dtype == jnp.bfloat16 and all(x.shape[3] <= LANES for x in arrays)
    return _TILE if short else _TILE_OF_LONG_PRODUCTS


def up(size: int, multiple: int) -> int:
    """The least positive multiple that is at least the size."""
    return max(1, -(-size // multiple)) * multiple


def sizes(length: int, tile: int, part: int | None = None) -> Sizes:
    """Tiles of about equal sizes, at most `tile`; and parts of equal numbers of them."""
    num_tiles = up(length, tile) // tile
    tile = up(-(-length // num_tiles), LANES)
    num_parts = 1 if part is None else up(num_tiles * tile, part) // part
    tiles_of_part = -(-num_tiles // num_parts)
    return Sizes(num_parts * tiles_of_part * tile, tiles_of_part * tile, tile)


def columns(x: jax.Array, length: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch * heads, dim, length], filled up with zeros."""
    batch, rows, heads, dim = x.shape
    x = jnp.transpose(x, (0, 2, 3, 1)).reshape(batch * heads, dim, rows)
    return jnp.pad(x, ((0, 0), (0, up(dim, ONES) - dim), (0, length - rows)))


def rows(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The other way round, without what was filled up."""
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
    """Calls a kernel for every tile of what passes by, x, and what stays, y; those of y first.

    Args:
      kernel: takes references to the first row of y that stays, int32 [1, 1]; to all arrays in the
        order here; to the results and the sums.
      constants: one number, [1, 1], and for each head [batch * heads, any, 1].
      passing: [batch * heads, any, x.length].
      staying: [batch * heads or a divisor, any, y.length].
      of_x: the dim of each result along x; the kernel adds to it over the tiles of y.
      of_y: the dim of each result along y; the kernel adds to it over the tiles of x.
      x: how x is divided.
      y: how y is.
      sums: shapes of arrays of float32 in VMEM.
      contracted: the dim over which each product that gives a tile sums.
      produced: the dim of the result of each product of a tile with points or values.
      how: what it multiplies.
      name: the kernel's.
      interpret: whether to interpret it.

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
    """What XLA cannot see: operations as the matrix unit does them, exponentials, bytes moved.

    The unit sums over 128 at a time, whatever the dim, and takes six passes for float32.
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
    """The product over an axis of each, in one pass of bfloat16 or in float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def points(ref: Any, centre_ref: Any, how: Operands) -> jax.Array:
    """Points [dim, rows], as the products take them."""
    if not how.centred:
        return ref[0]
    return (ref[0].astype(jnp.float32) - centre_ref[0]).astype(how.dtype)


def column(row: jax.Array) -> jax.Array:
    """[1, length] -> [length, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def with_ones(x: jax.Array) -> jax.Array:
    """Rows of ones below [dim, length]: a product with it sums as well, at no cost."""
    ones = jnp.ones((ONES, x.shape[1]), x.dtype)
    return jnp.concatenate([x, ones], axis=0)


def add(ref: Any, at: tuple[Any, ...], x: jax.Array, is_first: jax.Array) -> None:
    """Adds to what has been added before, if this is not the first."""

    @pl.when(is_first)
    def _() -> None:
        ref[at] = x

    @pl.when(jnp.logical_not(is_first))
    def _() -> None:
        ref[at] += x
