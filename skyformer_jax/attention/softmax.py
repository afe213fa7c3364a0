"""Softmax attention, the exact baseline (Vaswani et al., 2017, equation 1)."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import check_and_hide_masked


def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale * Q K^T) V, by jax.nn.dot_product_attention.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused, nothing here is random; part of the common signature.
      scale: factor of the scores; None means head_dim**-0.5.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value; zeros for an example without any
      real key.

    Raises:
      ValueError: if shapes do not fit or the mask is not boolean.
    """
    del rng
    key, value = check_and_hide_masked(query, key, value, mask)
    dtype = jnp.result_type(query, key, value)
    out = jax.nn.dot_product_attention(
        query.astype(dtype),
        key.astype(dtype),
        value.astype(dtype),
        mask=None if mask is None else mask[:, None, None, :],
        scale=scale,
    )
    if mask is not None:
        # A row without any key would otherwise be the plain mean over the padding.
        out = jnp.where(mask.any(axis=1)[:, None, None, None], out, 0)
    return out.astype(value.dtype)
