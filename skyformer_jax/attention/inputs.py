"""What every attention does with its arguments before its own mathematics begins."""

import jax
import jax.numpy as jnp


def check_and_hide_masked(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Checks shapes and dtypes, and returns key and value with masked positions set to zero.

    Selecting (not multiplying) by the mask stops NaN and infinity in padding, in the values and
    in the gradients.

    Args:
      query: [batch, q_length, heads, head_dim], floating.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens, or None if all are real.

    Returns:
      key and value, unchanged at real positions, 0 elsewhere.

    Raises:
      ValueError: if shapes do not fit each other or the mask is not boolean.
    """
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "query, key and value must be [batch, length, heads, head_dim]; "
            f"got query {query.shape} and key {key.shape}"
        )
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {key.shape} and {value.shape}")
    if query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "query and key must agree in batch, heads and head_dim; "
            f"got query {query.shape} and key {key.shape}"
        )
    if mask is None:
        return key, value
    if mask.dtype != jnp.bool_ or mask.shape != key.shape[:2]:
        raise ValueError(
            f"mask must be bool [batch, kv_length] = {key.shape[:2]}, True at real tokens; "
            f"got {mask.dtype} {mask.shape}"
        )
    real = mask[:, :, None, None]
    return jnp.where(real, key, 0), jnp.where(real, value, 0)
