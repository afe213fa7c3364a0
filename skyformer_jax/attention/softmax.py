"""Softmax attention, the exact baseline (Vaswani et al., 2017, equation 1)."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.inputs import check_and_hide_masked


def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: float | None = None,
    full_mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """softmax(scale * Q K^T + bias) V, by jax.nn.dot_product_attention.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused, nothing here is random; part of the common signature.
      scale: factor of the scores; None means head_dim**-0.5.
      full_mask: bool, broadcastable to [batch, heads, q_length, kv_length], True where a query may
        attend to a key.
      bias: added to the scores, broadcastable to their shape.
      is_causal: True lets query i attend to keys 0..i only.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value; zeros for a query that may attend
      to no key.

    Raises:
      ValueError: if shapes do not fit or a mask is not boolean.
    """
    del rng
    key, value = check_and_hide_masked(query, key, value, mask)
    dtype = jnp.result_type(query, key, value)
    allowed = None if mask is None else mask[:, None, None, :]
    if full_mask is not None:
        if full_mask.dtype != jnp.bool_ or full_mask.ndim != 4:
            raise ValueError(
                "full_mask must be bool [batch, heads, q_length, kv_length]; "
                f"got {full_mask.dtype} {full_mask.shape}"
            )
        allowed = full_mask if allowed is None else allowed & full_mask
    # JAX's own function mixes bfloat16 and float32, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            query.astype(dtype),
            key.astype(dtype),
            value.astype(dtype),
            bias=bias,
            mask=allowed,
            scale=scale,
            is_causal=is_causal,
        )
    if allowed is not None:
        # A row without any key would otherwise be the plain mean over the padding.
        if is_causal:
            allowed = allowed & jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        some = jnp.moveaxis(allowed.any(axis=-1), 1, 2)[..., None]
        out = jnp.where(some, out, 0)
    return out.astype(value.dtype)


def attend_to_split_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    axis_name: str | None,
) -> jax.Array:
    """softmax(scale * Q K^T) V for few queries, all on each device, and keys that are split.

    Args:
      query: float32 [batch, q_length, heads, head_dim].
      key: float32 [batch, kv_length, heads, head_dim], finite everywhere, as are the values.
      value: likewise.
      mask: bool [batch, kv_length], True at real tokens.
      scale: factor of the scores.
      axis_name: mesh axis over which the keys are split; None: they are not.

    Returns:
      float32 [batch, q_length, heads, head_dim]; zeros for an example without any real key.
    """
    if axis_name is None:
        return softmax_attention(query, key, value, mask=mask, scale=scale)
    scores = scale * jnp.einsum("bqhp,bkhp->bhqk", query, key)
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    top = shards.pmax(scores.max(axis=-1, keepdims=True), axis_name)
    weights = jnp.exp(scores - jnp.maximum(top, jnp.finfo(scores.dtype).min))
    out = shards.psum(jnp.einsum("bhqk,bkhp->bqhp", weights, value), axis_name)
    mass = shards.psum(weights.sum(axis=-1), axis_name)
    mass = jnp.moveaxis(mass, 1, 2)[..., None]
    return out / jnp.where(mass > 0, mass, 1)
