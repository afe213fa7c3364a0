"""Rotary positions (Su et al., 2021, RoFormer, section 3.2)."""

import jax
import jax.numpy as jnp

_BASE = 10_000.0


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries or keys, each pair of features turned by an angle that is linear in the position.

    Products and distances of queries and keys then depend on their positions through the
    difference alone. Feature i and feature i + head_dim / 2 are a pair, of the angle
    position * 10,000^(-2 i / head_dim).

    Args:
      x: [batch, length, heads, head_dim], head_dim even.
      positions: int [length].

    Returns:
      [batch, length, heads, head_dim] in the dtype of x.

    Raises:
      ValueError: if head_dim is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim; got {head_dim}")
    frequencies = _BASE ** (-2 * jnp.arange(head_dim // 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, None].astype(jnp.float32) * frequencies[None]
    cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
