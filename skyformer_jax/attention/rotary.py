"""Rotary position embeddings (Su et al., 2021, RoFormer, section 3.2)."""

import jax
import jax.numpy as jnp

_BASE = 10_000.0


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates each pair of features of queries or keys by an angle linear in the position.

    Products and distances of queries and keys then depend only on the difference of their
    positions. Features i and i + head_dim / 2 are a pair, rotated by the angle
    position * 10,000^(-2 i / head_dim).

    Args:
      x: [batch, length, heads, head_dim], head_dim even.
      positions: int [length], or [batch, length].

    Returns:
      [batch, length, heads, head_dim] in the dtype of x.

    Raises:
      ValueError: if head_dim is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim; got {head_dim}")
    frequencies = _BASE ** (-2 * jnp.arange(head_dim // 2, dtype=jnp.float32) / head_dim)
    positions = positions if positions.ndim == 2 else positions[None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def positions_in_segments(segment_ids: jax.Array) -> jax.Array:
    """Returns int32 [batch, length]: each position, counted from the first of its segment."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
