"""The device mesh: axis "data" shards each batch, axis "seq" the sequences of its examples."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from skyformer_jax.data.batches import Batch, BatchShards

DATA, SEQ = "data", "seq"


def make_mesh(
    data: int | None = None, seq: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh of the devices with the axes "data" and "seq".

    Args:
      data: number of shards of each batch; None means all devices, divided by seq.
      seq: number of shards of each sequence.
      devices: data * seq devices; None means the devices of all processes.
    """
    data = jax.device_count() // seq if data is None else data
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, seq), (DATA, SEQ), axis_types=auto, devices=devices)


def sequence_axis(mesh: Mesh) -> str | None:
    """Returns the axis_name for a model on this mesh; None if sequences are not sharded."""
    return SEQ if mesh.shape[SEQ] > 1 else None


def describe(mesh: Mesh) -> str:
    """Describes the mesh in words."""
    text = f"{mesh.size} {mesh.devices.flat[0].platform} device(s)"
    if mesh.shape[SEQ] > 1:
        text += f" ({mesh.shape[DATA]} along data, {mesh.shape[SEQ]} along seq)"
    return text + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, P())


def local_shards(mesh: Mesh) -> BatchShards:
    """Returns the shards of each batch that the devices of this process compute."""
    process = jax.process_index()
    indices = tuple(
        i
        for i, row in enumerate(mesh.devices)
        if any(device.process_index == process for device in row)
    )
    return BatchShards(indices, mesh.shape[DATA])


def batch_specs(batch: Any, axis: int = 0) -> Any:
    """Returns a PartitionSpec for each array of a batch, or of any tree of arrays of examples.

    Args:
      batch: arrays whose axis `axis` is the examples; the last axis of a Batch's tokens is the
        sequence.
      axis: index of the examples' axis.
    """
    examples: Any = P(*[None] * axis, DATA)  # Any, since it stands for an array
    if not isinstance(batch, Batch):
        return jax.tree.map(lambda _: examples, batch)
    between = [None] * (batch.tokens.ndim - axis - 2)
    tokens: Any = P(*examples, *between, SEQ)
    positions = None if batch.positions is None else tokens
    return Batch(tokens, examples, examples, positions)


def shard_batch(batch: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Puts this process's shards of a batch on its devices, as global arrays.

    Args:
      batch: NumPy arrays, see batch_specs: the examples of local_shards(mesh), in order, with
        whole sequences.
      mesh: the device mesh.
      axis: index of the examples' axis.
    """
    shards = local_shards(mesh)

    def put(x: np.ndarray, spec: P) -> jax.Array:
        size = x.shape[axis] // len(shards.indices)  # examples per shard
        shape = (*x.shape[:axis], size * shards.num_shards, *x.shape[axis + 1 :])

        def of_device(index: Any) -> np.ndarray:  # index: a slice for each axis
            first = shards.indices.index((index[axis].start or 0) // size) * size
            return x[*index[:axis], first : first + size, *index[axis + 1 :]]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), of_device)

    # tree.map treats a PartitionSpec as a leaf.
    return jax.tree.map(put, batch, batch_specs(batch, axis))


def shard_map(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Maps a function of one device's shards over every device of the mesh.

    Args:
      function: a function of shards; its collectives use the axis names of the mesh.
      mesh: the device mesh.
      in_specs: a PartitionSpec for each array of the arguments.
      out_specs: a PartitionSpec for each array of the result.
    """
    # With check_vma=True the gradients of replicated parameters would be summed before pmean.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
