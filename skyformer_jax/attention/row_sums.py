"""Sums of a kernel's rows, computed as one more feature of the values, and the division by them."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import hide, zeros_like


def with_ones(value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Values with one more feature: 1 at real keys, 0 at masked ones.

    Args:
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens, or None.

    Returns:
      [batch, kv_length, heads, head_dim + 1].
    """
    ones = zeros_like(value[..., :1]) + jnp.ones((), value.dtype)
    ones = ones if mask is None else hide(ones, mask)
    return jnp.concatenate([value, ones], axis=-1)


def over_row_sums(out: jax.Array, least: jax.Array | float = 0.0) -> jax.Array:
    """What with_ones's values gave, divided by its last feature.

    Args:
      out: [batch, q_length, heads, head_dim + 1].
      least: [batch, q_length, heads, 1] or a number; sums below it count as it.

    Returns:
      [batch, q_length, heads, head_dim]; zeros where the sum is not positive.
    """
    sums = jnp.maximum(out[..., -1:], least)
    return jnp.where(sums > 0, out[..., :-1] / jnp.where(sums > 0, sums, 1), 0)
