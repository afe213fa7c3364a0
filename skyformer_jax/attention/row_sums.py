"""Row sums of a kernel, computed as an extra feature of the values, and division by them."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import hide, zeros_like

# Far above the smallest float32, so that its inverse times a gradient is finite.
LEAST_SUM = 1e-30


def with_ones(value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Appends a feature to the values: 1 at real keys, 0 at masked ones.

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
    """Divides an attention's result for the values of with_ones by its last feature.

    If all keys are far from a query, its sum of Gaussians may be as small as float32 can represent.
    The derivatives of a plain quotient then overflow because they divide by the square of the sum;
    those of `divide` do not. Sums below LEAST_SUM are raised to it, so that such a row fades to
    zero.

    Args:
      out: [batch, q_length, heads, head_dim + 1].
      least: [batch, q_length, heads, 1] or a number; sums below it are raised to it.

    Returns:
      [batch, q_length, heads, head_dim].
    """
    sums = jnp.maximum(jnp.maximum(out[..., -1:], least), LEAST_SUM)
    return divide(out[..., :-1], sums)


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes x / y, with derivatives of all orders that never compute the square of y.

    Args:
      x: [..., n].
      y: [..., 1], not zero.
    """
    return x / y


@divide.defjvp
def _divide_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    quotient = divide(x, y)
    return quotient, divide(dx - quotient * dy, y)
