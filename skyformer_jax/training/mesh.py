"""The mesh of devices: "data" divides each batch, "seq" the sequences of its examples."""

import math
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
    """The devices along both axes.

    Args:
      data: parts of each batch; None means as many as the devices allow.
      seq: parts of each sequence.
      devices: data * seq of them; None means all, of all processes.
    """
    data = jax.device_count() // seq if data is None else data
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, seq), (DATA, SEQ), axis_types=auto, devices=devices)


def sequence_axis(mesh: Mesh) -> str | None:
    """The axis_name of a model on this mesh: None where sequences are whole."""
    return SEQ if mesh.shape[SEQ] > 1 else None


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has."""
    return NamedSharding(mesh, P())


def part_of_process(mesh: Mesh) -> BatchShards:
    """Which parts of each batch this process has to read."""
    process = jax.process_index()
    here = [
        i
        for i, row in enumerate(mesh.devices)
        if any(device.process_index == process for device in row)
    ]
    return BatchShards(tuple(here), mesh.shape[DATA])


def specs(batch: Any, axis: int = 0) -> Any:
    """A PartitionSpec for each array of a batch, or of any tree of arrays of examples.

    Args:
      batch: arrays whose axis of that number is that of the examples; the tokens of a Batch have
        the sequence as their last one.
      axis: see there.
    """
    examples = P(*[None] * axis, DATA)
    if not isinstance(batch, Batch):
        return jax.tree.map(lambda _: examples, batch)
    between = [None] * (batch.tokens.ndim - axis - 2)
    return Batch(P(*examples, *between, SEQ), examples, examples)


def shard_batch(batch: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """The arrays of this process's share of a batch, on its devices, as parts of global arrays.

    Args:
      batch: of NumPy arrays, as specs says; its examples are those of part_of_process, in order,
        and their sequences whole.
      mesh: of the devices.
      axis: of the examples: 0, or 2 for the batches that make_train_step's function takes.
    """
    part = part_of_process(mesh)

    def place(x: np.ndarray, spec: P) -> jax.Array:
        size = x.shape[axis] // len(part.indices)  # examples of each device
        shape = (*x.shape[:axis], size * part.count, *x.shape[axis + 1 :])

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            first = part.indices.index((index[axis].start or 0) // size) * size
            return x[*index[:axis], first : first + size, *index[axis + 1 :]]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), of_device)

    # Trees of PartitionSpecs are flattened with them as leaves.
    return jax.tree.map(place, batch, specs(batch, axis))


def spread(
    function: Callable[..., Any], mesh: Mesh, backend: str, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """The function of one device's shares on every device of the mesh.

    Args:
      function: uses the names of the mesh's axes.
      mesh: of the devices.
      backend: "shard_map"; or "pmap", for a mesh without a "seq" axis, in one process.
      in_specs: a PartitionSpec for each array of the arguments.
      out_specs: likewise of what it returns; P() for all with pmap.
    """
    if backend == "shard_map":
        # With check_vma=True the gradients of replicated parameters would be summed before pmean.
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

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
        def divide(x: jax.Array) -> jax.Array:
            at, parts = axis(spec), mesh.shape[DATA]
            return x.reshape(*x.shape[:at], parts, x.shape[at] // parts, *x.shape[at + 1 :])

        return arrays if axis(spec) is None else jax.tree.map(divide, arrays)

    def call(*arguments: Any) -> Any:
        return mapped(*jax.tree.map(divided, in_specs, arguments, is_leaf=is_spec))

    return call


def memory_limit() -> float:
    """Bytes that a device has, or infinity where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
