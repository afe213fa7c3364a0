"""A sequence in equal parts over the devices of a mesh axis; with axis_name=None, in one part.

Each device has a run of consecutive positions, in the order of the axis. These are the few things
that an attention then has to ask of the others; none of them grows with the length.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp


def shard_index(axis_name: str | None) -> jax.Array | int:
    """Which part of the sequence is here."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def num_shards(axis_name: str | None) -> int:
    """In how many parts the sequence is."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def total(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum over the parts."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def largest(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The maximum over the parts, as a constant to derivatives."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def places(length: int, axis_name: str | None) -> jax.Array:
    """int32 [length]: positions in the whole sequence of those here."""
    return shard_index(axis_name) * length + jnp.arange(length, dtype=jnp.int32)


def ordinals(masks: Sequence[jax.Array], axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Counts the real rows of sequences that follow one another, each split over the axis.

    Args:
      masks: bool [batch, length], any length, one for each sequence, True at the rows that count.
      axis_name: of the split.

    Returns:
      int32 [batch, sum of lengths]: of each row, how many rows count up to it and with it; and
      int32 [batch], how many count altogether.
    """
    here = jnp.stack([mask.sum(axis=1, dtype=jnp.int32) for mask in masks])
    before, of_sequence = jnp.zeros_like(here), here
    if axis_name is not None:
        everywhere = jax.lax.all_gather(here, axis_name)
        earlier = jnp.arange(len(everywhere)) < shard_index(axis_name)
        before = jnp.where(earlier[:, None, None], everywhere, 0).sum(axis=0)
        of_sequence = everywhere.sum(axis=0)
    before += jnp.cumsum(of_sequence, axis=0) - of_sequence
    counted = [
        jnp.cumsum(mask, axis=1, dtype=jnp.int32) + first[:, None]
        for mask, first in zip(masks, before, strict=True)
    ]
    return jnp.concatenate(counted, axis=1), of_sequence.sum(axis=0)


def with_neighbours(x: jax.Array, count: int, axis_name: str | None) -> jax.Array:
    """The part of a sequence here, and count positions on either side of it.

    Args:
      x: [batch, length, width].
      count: at most length, where there are several parts.
      axis_name: of the split.

    Returns:
      [batch, length + 2 * count, width]; zeros beyond the ends of the whole sequence.

    Raises:
      ValueError: if a part is shorter than count.
    """
    if axis_name is None:
        return jnp.pad(x, ((0, 0), (count, count), (0, 0)))
    length, parts = x.shape[1], num_shards(axis_name)
    if length < count:
        raise ValueError(f"parts of {length} positions are too short: {count} are needed")
    # A device that nobody sends to gets zeros.
    before = jax.lax.ppermute(
        x[:, length - count :], axis_name, [(i, i + 1) for i in range(parts - 1)]
    )
    after = jax.lax.ppermute(x[:, :count], axis_name, [(i + 1, i) for i in range(parts - 1)])
    return jnp.concatenate([before, x, after], axis=1)


def passed_on(tree: Any, axis_name: str) -> Any:
    """What the device before this one has, round a ring."""
    parts = num_shards(axis_name)
    to_next = [(i, (i + 1) % parts) for i in range(parts)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, to_next), tree)


def random_words(key: jax.Array, counters: jax.Array) -> jax.Array:
    """Random bits that depend on the key and on a number alone, so that every device has its own.

    Args:
      key: a jax.random key.
      counters: uint32, of any shape.

    Returns:
      uint32 [2, ...]: two words of 32 bits for each counter.
    """
    flat = counters.ravel()
    words = jax.extend.random.threefry_2x32(
        jax.random.bits(key, (2,)), jnp.concatenate([flat, jnp.zeros_like(flat)])
    )
    return words.reshape(2, *counters.shape)
