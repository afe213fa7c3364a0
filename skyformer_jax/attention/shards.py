"""Collectives for a sequence that is split over the devices of a mesh axis.

Each device has an equally long shard of consecutive positions, in the order of the axis. With
axis_name=None the sequence is not split, and nothing is communicated. The data sent between devices
does not grow with the length, except in ring_shift.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def shard_index(axis_name: str | None) -> jax.Array | int:
    """Returns the index of this device's shard."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def num_shards(axis_name: str | None) -> int:
    """Returns the number of shards."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def psum(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the sum over the shards."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def pmax(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the maximum over the shards, without a gradient."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def positions(length: int, axis_name: str | None) -> jax.Array:
    """Returns int32 [length]: the positions of this shard's rows in the whole sequence."""
    return shard_index(axis_name) * length + jnp.arange(length, dtype=jnp.int32)


def running_counts(
    masks: Sequence[jax.Array], axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Numbers the real rows of concatenated sequences, each of which is split over the axis.

    Args:
      masks: bool [batch, length] for each sequence, True at real rows; lengths may differ.
      axis_name: the mesh axis over which the sequences are split, or None.

    Returns:
      int32 [batch, sum of lengths]: for each row of this shard, the number of real rows up to and
      including it, in all shards; and int32 [batch], the number of all real rows.
    """
    here = jnp.stack([mask.sum(axis=1, dtype=jnp.int32) for mask in masks])
    before, of_sequence = jnp.zeros_like(here), here
    if axis_name is not None:
        everywhere = jax.lax.all_gather(here, axis_name)
        earlier = jnp.arange(len(everywhere)) < shard_index(axis_name)
        before = jnp.where(earlier[:, None, None], everywhere, 0).sum(axis=0, dtype=jnp.int32)
        of_sequence = everywhere.sum(axis=0, dtype=jnp.int32)
    before += jnp.cumsum(of_sequence, axis=0, dtype=jnp.int32) - of_sequence
    counted = [
        jnp.cumsum(mask, axis=1, dtype=jnp.int32) + first[:, None]
        for mask, first in zip(masks, before, strict=True)
    ]
    return jnp.concatenate(counted, axis=1), of_sequence.sum(axis=0, dtype=jnp.int32)


def with_halo(x: jax.Array, size: int, axis_name: str | None) -> jax.Array:
    """Extends a shard by the neighbouring positions on both sides.

    Args:
      x: [batch, length, width].
      size: positions to add on each side; at most length where there are several shards.
      axis_name: the mesh axis over which the sequence is split, or None.

    Returns:
      [batch, length + 2 * size, width]; zeros beyond the ends of the whole sequence.

    Raises:
      ValueError: if a shard is shorter than size.
    """
    if axis_name is None:
        return jnp.pad(x, ((0, 0), (size, size), (0, 0)))
    length, count = x.shape[1], num_shards(axis_name)
    if length < size:
        raise ValueError(f"parts of {length} positions are too short: {size} are needed")
    # ppermute gives zeros to a device that receives nothing.
    before = jax.lax.ppermute(
        x[:, length - size :], axis_name, [(i, i + 1) for i in range(count - 1)]
    )
    after = jax.lax.ppermute(x[:, :size], axis_name, [(i + 1, i) for i in range(count - 1)])
    return jnp.concatenate([before, x, after], axis=1)


def ring_shift(tree: Any, axis_name: str) -> Any:
    """Sends arrays to the next device of a ring and returns those of the previous device."""
    count = num_shards(axis_name)
    to_next = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, to_next), tree)
