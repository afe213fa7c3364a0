"""Softmax attention, the exact baseline (Vaswani et al., 2017, equation 1)."""

from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import attention_function, repeat_heads
from skyformer_jax.attention.inputs import (
    check_full_mask,
    equal_head_dims,
    floating_arrays,
    hide_masked,
    known_options,
    with_all_axes,
)


@attention_function(takes_groups=True)
def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    full_mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """softmax(scale * Q K^T + bias) V, by jax.nn.dot_product_attention.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, kv_heads, head_dim].
      value: [batch, kv_length, kv_heads, value_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused, nothing here is random; part of the common signature.
      scale: factor of the scores; None means head_dim**-0.5.
      full_mask: bool, broadcastable to [batch, heads, q_length, kv_length], True where a query may
        attend to a key.
      bias: added to the scores, broadcastable to their shape.
      is_causal: True lets query i attend to keys 0..i only.

    Returns:
      [batch, q_length, heads, value_dim] in the dtype of value; zeros for a query that may attend
      to no key.

    Raises:
      ValueError: if shapes do not fit or a mask is not boolean.
    """
    del rng
    key, value = hide_masked(key, value, mask)
    allowed, bias = _restrictions(query, key, mask, full_mask, bias, is_causal)
    dtype, value_dim = _common_dtype(query, key, value), value.shape[-1]
    factor: Any = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, values = equal_head_dims(query, key, value)
    # JAX's own function mixes bfloat16 and float32, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            query.astype(dtype),
            key.astype(dtype),
            values.astype(dtype),
            bias=bias,
            mask=allowed,
            scale=factor,
        )[..., :value_dim]
    if allowed is not None:
        # A row without any key would otherwise be the plain mean over the padding.
        some = jnp.moveaxis(allowed.any(axis=-1), 1, 2)[..., None]
        out = jnp.where(some, out, 0)
    return out.astype(value.dtype)


def softmax_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    full_mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """The weights softmax(scale * Q K^T + bias) of softmax_attention, to look at.

    Args:
      query: [batch, q_length, heads, head_dim], as in softmax_attention.
      key: [batch, kv_length, kv_heads, head_dim], likewise.
      mask: likewise.
      scale: likewise.
      full_mask: likewise.
      bias: likewise.
      is_causal: likewise.

    Returns:
      [batch, heads, q_length, kv_length] in the common dtype of query and key; each row sums to 1,
      or is zeros where a query may attend to no key.
    """
    query, key = floating_arrays(query, key)
    scale = known_options({"scale": scale})["scale"]
    key, _ = hide_masked(key, key, mask)
    allowed, bias = _restrictions(query, key, mask, full_mask, bias, is_causal)
    dtype = _common_dtype(query, key)
    key = repeat_heads(key, query.shape[2]).astype(dtype)
    scores = jnp.einsum(
        "bqhp,bkhp->bhqk", query.astype(dtype), key, preferred_element_type=jnp.float32
    )
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        scores += bias.astype(jnp.float32)
    if allowed is None:
        return jax.nn.softmax(scores).astype(dtype)
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    some = allowed.any(axis=-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(scores), 0).astype(dtype)


def _common_dtype(*arrays: jax.Array) -> Any:
    """The dtype of products, of arrays that may differ even where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def _restrictions(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    full_mask: jax.Array | None,
    bias: jax.Array | None,
    is_causal: bool,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which keys a query may attend to, bool, and the bias; both of four axes, or None."""
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    allowed = None if mask is None else mask[:, None, None, :]
    if full_mask is not None:
        full_mask = check_full_mask(full_mask, query, key)
        allowed = full_mask if allowed is None else allowed & full_mask
    if is_causal:
        earlier = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        allowed = earlier if allowed is None else allowed & earlier
    return allowed, None if bias is None else with_all_axes("bias", bias, shape)


def attend_to_split_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: jax.Array | float,
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
