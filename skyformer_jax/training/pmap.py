"""jax.pmap in place of jax.shard_map, for parallel.backend=pmap: one process, batches divided."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from skyformer_jax.training.mesh import DATA


def pmap(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """As mesh.shard_map, by jax.pmap.

    Args:
      function: uses the axis name "data" in its collectives.
      mesh: devices of one process, all along "data".
      in_specs: a PartitionSpec for each array of the arguments; only "data" divides.
      out_specs: P() for all results: they are the same on all devices.
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
        """The arrays with an axis of devices before that of the examples."""
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
