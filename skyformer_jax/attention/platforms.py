"""Calls what is right on the platform that a program is compiled for, on each device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

IMPLEMENTATIONS = ("auto", "dense", "chunked", "pallas")

# The axes of an array, a letter each: "b" batch, "h" heads, "." any other.
ROWS = "b.h."  # [batch, length, heads, dim]
ROW_SUMS = "bh."  # [batch, heads, length]
MASK = "bh.."  # [batch or 1, heads or 1, q_length or 1, kv_length or 1]
SCALAR = ""


def check_implementation(implementation: str) -> None:
    """Raises a ValueError for one that is not of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )


class Kernels(NamedTuple):
    """Kernels that do the same on several platforms.

    Attributes:
      functions: by platform.
      arrays: the axes of each argument, as above.
      results: the axes of the result, or a tuple of those of the results.
    """

    functions: Mapping[str, Callable[..., Any]]
    arrays: tuple[str, ...]
    results: str | tuple[str, ...]


def by_platform(
    tiled: Callable[..., Any],
    precision: str | None,
    tiles: tuple[tuple[str, tuple[int, int]], ...],
    *arrays: jax.Array,
    kernels: Kernels | None = None,
    interpreted: bool = False,
) -> Any:
    """Calls a function of arrays, or the kernel of the platform that does the same.

    Args:
      tiled: a function of the arrays and a tile.
      precision: the precision of products, as jax.default_matmul_precision has it.
      tiles: items of a mapping from platforms, or "default", to the tile there.
      *arrays: the arrays.
      kernels: the kernels, which take the same arrays.
      interpreted: whether the kernel of GPUs is interpreted elsewhere, instead of calling tiled.
    """
    calls = {platform: functools.partial(tiled, tile=tile) for platform, tile in tiles}
    if kernels is not None:
        for platform in kernels.functions:
            calls[platform] = functools.partial(_on_each_device, kernels, platform)
    if interpreted:
        calls["cpu"] = calls["default"] = functools.partial(calls["cuda"], interpret=True)
    with jax.default_matmul_precision(precision):
        return jax.lax.platform_dependent(*arrays, **calls)


def _on_each_device(kernels: Kernels, platform: str, *arrays: jax.Array, **options: Any) -> Any:
    """Calls a kernel on every device's part, where a mesh with explicit axes divides the arrays.

    Args:
      kernels: see by_platform. The first of the arrays is of ROWS, and its division of batch and
        heads is that of all; axes of length 1 are not divided.
      platform: which of the kernels is called.
      *arrays: its arguments.
      **options: of the kernel.
    """
    function = functools.partial(kernels.functions[platform], **options)
    sharding = jax.typeof(arrays[0]).sharding
    batch, _, heads, _ = sharding.spec if len(sharding.spec) == 4 else (None,) * 4
    if batch is None and heads is None:
        return function(*arrays)
    divided = {"b": batch, "h": heads}
    names = {name for axes in divided.values() for name in _names(axes)}

    def spec(axes: str) -> P:
        return P(*map(divided.get, axes))

    def spec_of(axes: str, x: jax.Array) -> P:
        pairs = zip(spec(axes), x.shape, strict=True)
        return P(*(None if size == 1 else entry for entry, size in pairs))

    in_specs = tuple(spec_of(axes, x) for axes, x in zip(kernels.arrays, arrays, strict=True))
    arrays = tuple(
        jax.sharding.reshard(x, NamedSharding(sharding.mesh, s))
        for x, s in zip(arrays, in_specs, strict=True)
    )
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=in_specs,
        out_specs=jax.tree.map(spec, kernels.results),
        axis_names=names,
        check_vma=False,
    )(*arrays)


def _names(axes: Any) -> tuple[str, ...]:
    """The axes of a mesh in an entry of a PartitionSpec."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)
