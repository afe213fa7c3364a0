"""Calls, on each device, the implementation for the platform that a program is compiled for."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

IMPLEMENTATIONS = ("auto", "dense", "chunked", "pallas")

# The axes of an array, one letter each: "b" for batch, "h" for heads, "." for any other.
ROWS = "b.h."  # [batch, length, heads, dim]
ROW_SUMS = "bh."  # [batch, heads, length]
MASK = "bh.."  # [batch or 1, heads or 1, q_length or 1, kv_length or 1]
SCALAR = ""


def check_implementation(implementation: str) -> None:
    """Raises a ValueError unless implementation is one of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )


class Kernels(NamedTuple):
    """Kernels that compute the same function on different platforms.

    Attributes:
      functions: the kernels, by platform.
      arrays: the axes of each argument, such as ROWS.
      results: the axes of the result, or a tuple with the axes of each result.
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
    """Calls a tiled function of arrays, or the platform's kernel if there is one.

    Args:
      tiled: a function of the arrays and a keyword argument, tile.
      precision: the precision of products, a value of jax.default_matmul_precision.
      tiles: items of a mapping from platforms, or "default", to the tile size there.
      *arrays: the arrays.
      kernels: kernels that take the same arrays.
      interpreted: True runs the GPU kernel in interpret mode on platforms without a kernel, instead
        of calling tiled.
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
    """Calls a kernel on each device's shard if the arrays are sharded over explicit mesh axes.

    Args:
      kernels: see by_platform. The first array has the axes ROWS. All arrays are sharded over batch
        and heads like the first; axes of length 1 are not sharded.
      platform: the platform whose kernel is called.
      *arrays: the kernel's arrays.
      **options: keyword arguments of the kernel.
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
    """The mesh axes in one entry of a PartitionSpec."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)
