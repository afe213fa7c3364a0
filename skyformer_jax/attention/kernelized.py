"""Kernelized Attention (Chen et al., 2021, section 4.1), on one device or with a split sequence."""

from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.gaussian import gaussian_attention
from skyformer_jax.attention.inputs import hide_masked, zeros_like

# For keys and values that are split over devices: they go round a ring, past the queries of each.
# The rule for gradients sends them round again, with their gradients, instead of keeping every part
# that passed.


def _ring_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    axis_name: str,
    implementation: str,
) -> jax.Array:
    def turn(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, key, value = carry
        out += gaussian_attention(query, key, value, scale=scale, implementation=implementation)
        return out, *shards.ring_shift((key, value), axis_name)

    zeros = zeros_like(query, jnp.float32, last=value.shape[-1])
    return jax.lax.fori_loop(0, shards.num_shards(axis_name), turn, (zeros, key, value))[0]


_ring = jax.custom_vjp(_ring_value, nondiff_argnums=(4, 5))


def _ring_forward(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _ring_value(*arguments), arguments[:4]


def _ring_backward(
    axis_name: str, implementation: str, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    query, key, value, scale = residuals

    def turn(_: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        (d_query, d_scale), (key, value, d_key, d_value) = carry

        def of_part(*arguments: jax.Array) -> jax.Array:
            query, key, value, scale = arguments
            return gaussian_attention(query, key, value, scale=scale, implementation=implementation)

        g_query, g_key, g_value, g_scale = jax.vjp(of_part, query, key, value, scale)[1](d_out)
        passing = (key, value, d_key + g_key, d_value + g_value)
        return (d_query + g_query, d_scale + g_scale), shards.ring_shift(passing, axis_name)

    d_query, d_key, d_value, d_scale = (
        zeros_like(x, jnp.float32) for x in (query, key, value, scale)
    )
    carry = (d_query, d_scale), (key, value, d_key, d_value)
    (d_query, d_scale), (_, _, d_key, d_value) = jax.lax.fori_loop(
        0, shards.num_shards(axis_name), turn, carry
    )
    gradients = (d_query, d_key, d_value, d_scale)
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, residuals, strict=True))


_ring.defvjp(_ring_forward, _ring_backward)


@attention_function(takes_explicit_axes=True)
def kernelized_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    implementation: str = "auto",
    axis_name: str | None = None,
) -> jax.Array:
    """Kernelized Attention: the Gaussian kernel in place of softmax, exact and quadratic.

    out_i = sum_j exp(-scale/2 ||q_i - k_j||^2) v_j over the real keys j (Chen et al., 2021,
    equation 4). It is not normalised: the output grows with the number of keys near a query.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused, nothing here is random; part of the common signature.
      scale: the kernel's inverse squared width; None means head_dim**-0.5.
      implementation: "auto", "dense", "chunked" or "pallas", see gaussian_attention.
      axis_name: name of a mesh axis, within jax.shard_map: each device has a run of the sequence,
        as long as the others', of query, key, value and mask. Keys and values go round the devices
        once, and again for gradients; no device ever holds more than two parts.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or the implementation is unknown.
    """
    del rng
    dtype = value.dtype
    key, value = hide_masked(key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if axis_name is None:
        out = gaussian_attention(query, key, value, scale=scale, implementation=implementation)
    else:
        ring_scale = jnp.asarray(scale, jnp.float32)
        out = _ring(query, key, value, ring_scale, axis_name, implementation)
    return out.astype(dtype)
