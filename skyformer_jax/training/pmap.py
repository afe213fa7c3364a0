"""jax.pmap instead of jax.shard_map, for parallel.backend=pmap: one process, sharded batches."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from skyformer_jax.training.mesh import DATA


def pmap(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Does what mesh.shard_map does, by jax.pmap.

    Args:
      function: a function of shards; its collectives use the axis name "data".
      mesh: devices of one process, all along "data".
      in_specs: a PartitionSpec for each array of the arguments; only "data" shards an array.
      out_specs: P() for all results, which must be the same on all devices.
    """
    del out_specs

    def axis(spec: P) -> int | None:
        return tuple(spec).index(DATA) if DATA in spec else None

    def is_spec(x: Any) -> bool:
        return isinstance(x, P)

    mapped = jax.pmap(
        function,
        axis_name=DATA,
        in_axes=jax.tree.map(axis, in_specs, is_leaf=is_spec),
        out_axes=None,
        devices=list(mesh.devices.ravel()),
    )

    def divided(spec: P, arrays: Any) -> Any:
        """Splits the examples' axis into an axis of devices and one of examples."""
        at, count = axis(spec), mesh.shape[DATA]
        if at is None:
            return arrays
        return jax.tree.map(
            lambda x: x.reshape(*x.shape[:at], count, x.shape[at] // count, *x.shape[at + 1 :]),
            arrays,
        )

    def call(*arguments: Any) -> Any:
        return mapped(*jax.tree.map(divided, in_specs, arguments, is_leaf=is_spec))

    return call
