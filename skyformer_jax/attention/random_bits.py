"""Counter-based random bits, and the dropout made of them.

The bits of an element depend on a key and on the element's number in the whole sequence alone, so
they are the same however the sequence is split over devices, and on every platform. How they are
computed is chosen by the platform that a program is compiled for: accelerators compute them where
they are used, CPUs beforehand.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp

from skyformer_jax.attention import shards

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry-2x32, in turns


def random_bits(key: jax.Array, counters: jax.Array) -> jax.Array:
    """Random bits of numbered elements, by the Threefry-2x32 hash (Salmon et al., 2011).

    Args:
      key: a jax.random key.
      counters: uint32, of any shape: the elements' numbers.

    Returns:
      uint32 [2, *counters.shape]: 64 bits for each counter.
    """

    def fused(seed: jax.Array, counters: jax.Array) -> jax.Array:
        return jnp.stack(threefry(seed, counters))

    seed = jax.random.bits(key, (2,), jnp.uint32)
    return jax.lax.platform_dependent(seed, counters, cpu=_threefry_of_all, default=fused)


def _threefry_of_all(seed: jax.Array, counters: jax.Array) -> jax.Array:
    """random_bits by JAX's own Threefry, an array of its own: on CPUs faster than the fused one."""
    flat = counters.ravel()
    words = jax.extend.random.threefry_2x32(seed, jnp.concatenate([flat, jnp.zeros_like(flat)]))
    return words.reshape(2, *counters.shape)


def threefry(seed: jax.Array, counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32, with 20 rounds, of the pairs (counter, 0).

    It is written element by element, so compilers merge it with what uses the bits, and they need
    no memory. JAX's own has one array of both words, which TPUs have to rearrange.

    Args:
      seed: uint32 [2].
      counters: uint32, of any shape.

    Returns:
      Two words, uint32, in the shape of the counters.
    """
    third = seed[0] ^ seed[1] ^ jnp.uint32(0x1BD11BDA)
    words = [jnp.broadcast_to(word, counters.shape) for word in (seed[0], seed[1], third)]
    x, y = counters + words[0], words[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def dropout(
    key: jax.Array, x: jax.Array, rate: float, *, axis_name: str | None = None
) -> jax.Array:
    """Sets each element to 0 with probability rate and divides the others by 1 - rate.

    Flax draws 32 bits for an element and uses half of what the generator computes for them. This
    function uses all of it, and 16 bits for an element, which on a CPU is a quarter of the work;
    Flax's would be a tenth of a training step. Accelerators compute each element's bits where they
    are used, which costs them less than to fetch bits from memory. The rate is rounded to a
    multiple of 2**-16, and so is the divisor.

    Args:
      key: a jax.random key.
      x: [batch, length, width].
      rate: in [0, 1).
      axis_name: the mesh axis over which the length is split.

    Returns:
      [batch, length, width] in the dtype of x. Which elements are dropped depends on the key and on
      their position in the whole sequence.
    """
    dropped = round(rate * 2**16)
    batch, length, width = x.shape
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * length * shards.num_shards(axis_name)
    rows = (rows + shards.positions(length, axis_name)[None]).astype(jnp.uint32)
    kept = jax.lax.platform_dependent(
        jax.random.bits(key, (2,), jnp.uint32),
        rows,
        cpu=functools.partial(_kept_of_all, width, dropped),
        default=functools.partial(_kept_fused, width, dropped),
    )
    return jnp.where(kept, x * (2**16 / (2**16 - dropped)), 0)


def _kept_of_all(width: int, dropped: int, seed: jax.Array, rows: jax.Array) -> jax.Array:
    """Which elements of numbered rows dropout keeps.

    A row has -(-width // 4) counters. Its elements take 16 bits each, the lower ones first, of the
    first words of all its counters, then of the second words.

    Args:
      width: elements of a row.
      dropped: an element whose 16 bits are less is dropped.
      seed: uint32 [2].
      rows: uint32 [batch, length].

    Returns:
      bool [batch, length, width].
    """
    num_counters = -(-width // 4)
    of_row = jnp.arange(num_counters, dtype=jnp.uint32)[None, None]
    words = _threefry_of_all(seed, rows[..., None] * num_counters + of_row)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(2, *rows.shape, -1)
    return jnp.concatenate([bits[0], bits[1]], axis=-1)[..., :width] >= dropped


def _kept_fused(width: int, dropped: int, seed: jax.Array, rows: jax.Array) -> jax.Array:
    """The same as _kept_of_all, where each element computes the words that it has bits of."""
    num_halves = 2 * -(-width // 4)
    half = jnp.arange(num_halves, dtype=jnp.uint32)[None, None]
    words = threefry(seed, rows[..., None] * (num_halves // 2) + half // 2)
    bits = jnp.concatenate([word >> (half % 2 * 16) for word in words], axis=-1)[..., :width]
    return bits & 0xFFFF >= dropped
