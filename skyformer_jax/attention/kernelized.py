"""Kernelized Attention (Chen et al., 2021, section 4.1), on one device or with a split sequence."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.derivatives import Arrays, with_rules
from skyformer_jax.attention.gaussian import gaussian_attention
from skyformer_jax.attention.inputs import (
    check_not_negative,
    hide_masked,
    hide_unseen,
    within_segments,
    zeros_like,
)
from skyformer_jax.attention.row_sums import over_row_sums, with_ones


@functools.cache
def _ring(axis_name: str, implementation: str) -> Callable[..., jax.Array]:
    """Returns kernelized attention of query, key, value and scale for a split sequence.

    Keys, values and their tangents travel round a ring, past the queries of each device. For
    gradients, keys and values travel round again together with their gradients, so no device stores
    the parts that passed it.
    """

    def of_part(*arrays: jax.Array) -> jax.Array:
        query, key, value, scale = arrays
        return gaussian_attention(query, key, value, scale=scale, implementation=implementation)

    def round_once(turn: Callable[..., tuple[Any, Arrays]], carry: Any, passing: Arrays) -> Any:
        """Calls turn(carry, passing) for the part of each device; returns both after the last."""

        def body(_: jax.Array, state: tuple[Any, Arrays]) -> tuple[Any, Arrays]:
            carry, passing = turn(*state)
            return carry, shards.ring_shift(passing, axis_name)

        return jax.lax.fori_loop(0, shards.num_shards(axis_name), body, (carry, passing))

    def value(query: jax.Array, *arrays: jax.Array) -> jax.Array:
        *passing, scale = arrays

        def turn(out: jax.Array, passing: Arrays) -> tuple[jax.Array, Arrays]:
            return out + of_part(query, *passing, scale), passing

        zeros = zeros_like(query, jnp.float32, last=arrays[1].shape[-1])
        return round_once(turn, zeros, tuple(passing))[0]

    def tangent(*arrays: jax.Array) -> jax.Array:
        query, key, value, scale, d_query, d_key, d_value, d_scale = arrays

        def turn(out: jax.Array, passing: Arrays) -> tuple[jax.Array, Arrays]:
            key, value, *tangents = passing
            primals, dots = (query, key, value, scale), (d_query, *tangents, d_scale)
            return out + jax.jvp(of_part, primals, dots)[1], passing

        zeros = zeros_like(query, jnp.float32, last=value.shape[-1])
        return round_once(turn, zeros, (key, value, d_key, d_value))[0]

    def gradients(*arrays: jax.Array) -> Arrays:
        query, key, value, scale, d_out = arrays

        def turn(carry: Arrays, passing: Arrays) -> tuple[Arrays, Arrays]:
            key, value, d_key, d_value = passing
            d_query, d_scale = carry
            of_query, of_key, of_value, of_scale = jax.vjp(of_part, query, key, value, scale)[1](
                d_out
            )
            passing = (key, value, d_key + of_key, d_value + of_value)
            return (d_query + of_query, d_scale + of_scale), passing

        d_query, d_key, d_value, d_scale = (zeros_like(x, jnp.float32) for x in arrays[:4])
        (d_query, d_scale), (_, _, d_key, d_value) = round_once(
            turn, (d_query, d_scale), (key, value, d_key, d_value)
        )
        found = (d_query, d_key, d_value, d_scale)
        return tuple(g.astype(x.dtype) for g, x in zip(found, arrays, strict=False))

    return with_rules(value, tangent, gradients)


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
    full_mask: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    normalize: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """Kernelized Attention: the Gaussian kernel in place of softmax, exact and quadratic.

    out_i = sum_j exp(-scale/2 ||q_i - k_j||^2) v_j over the real keys j (Chen et al., 2021,
    equation 4). By default it is not normalised: the output grows with the number of keys near a
    query.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, value_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused because nothing is random; part of the common signature.
      scale: the kernel's inverse squared width; None means head_dim**-0.5.
      implementation: "auto", "dense", "chunked" or "pallas"; see gaussian_attention.
      full_mask: bool, broadcastable to [batch, heads, q_length, kv_length], True where a key is
        part of a query's sum. Apart from the mask itself, memory stays linear in the length.
      is_causal: True restricts the sum of query i to keys 0..i.
      segment_ids: int [batch, length], for self-attention: each position attends only to positions
        of its own segment. They are expanded to a full_mask of one byte per pair of positions.
      normalize: divides each row by its sum, so that a query gets the mean of the values weighted
        by the kernel.
      axis_name: name of a mesh axis, within jax.shard_map. Each device then holds a run of the
        sequence, of the same length, of query, key, value and mask; full_mask and is_causal are
        not allowed. Keys and values pass all devices once, and again for gradients; no device ever
        holds more than two parts.

    Returns:
      [batch, q_length, heads, value_dim] in the dtype of value, computed in float32; zeros for a
      query without any key.

    Raises:
      ValueError: if shapes do not fit, a mask is not boolean, or the implementation is unknown or
        does not support full_mask or is_causal.
    """
    del rng
    dtype = value.dtype
    key, value = hide_masked(key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_not_negative(scale=scale)
    value = with_ones(value, mask) if normalize else value
    full_mask = within_segments(full_mask, segment_ids, query, key)
    key, value = hide_unseen(query, key, value, full_mask, is_causal)
    if full_mask is not None:
        of_keys_alone = full_mask.shape[1:3] == (1, 1)
        shape = (*full_mask.shape[:3], key.shape[1])
        full_mask = None if of_keys_alone else jnp.broadcast_to(full_mask, shape)
    if axis_name is None:
        out = gaussian_attention(
            query,
            key,
            value,
            scale=scale,
            implementation=implementation,
            mask=full_mask,
            is_causal=is_causal,
        )
    elif full_mask is not None or is_causal:
        raise ValueError(
            "full_mask and is_causal need the whole sequence on one device; with axis_name, "
            "kernelized attention takes a mask of keys"
        )
    else:
        ring_scale = jnp.asarray(scale, jnp.float32)
        out = _ring(axis_name, implementation)(query, key, value, ring_scale)
    return (over_row_sums(out) if normalize else out).astype(dtype)
