"""Nystromformer (Xiong et al., 2021): softmax attention by a Nystrom method on segment means.

With m landmark queries Q~ and keys K~, the means of m equal segments of the sequence
(equations 12 to 14),

    out = softmax(Q K~^T s) . Z . (softmax(Q~ K^T s) V) [+ DConv(V)],

where Z approximates the pseudo-inverse of A = softmax(Q~ K~^T s) by six iterations of
razavi_iterations from A^T / (||A||_1 ||A||_inf), and DConv is a depthwise convolution over the
sequence with one kernel per head (figure 2 of the paper, "skip connection").
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.convolution import conv_kernel_spec, convolve_values
from skyformer_jax.attention.inputs import (
    check_at_least,
    hide,
    hide_masked,
    masks_or_all,
)
from skyformer_jax.attention.inverses import matmul, razavi_iterations
from skyformer_jax.attention.landmarks import segment_means
from skyformer_jax.attention.softmax import attend_to_split_keys, softmax_attention
from skyformer_jax.attention.variables import VariableSpec


@attention_function()
def nystromformer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    num_landmarks: int = 128,
    num_iterations: int = 6,
    query_mask: jax.Array | None = None,
    conv_kernel: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Nystromformer attention, linear in the length.

    Segments divide the real tokens of each example, so padding is not part of any landmark. With a
    landmark for every real token and enough iterations it equals softmax_attention.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused because nothing is random; part of the common signature.
      scale: factor of the scores; None means head_dim**-0.5.
      num_landmarks: m; an example with fewer real queries or keys uses as many landmarks as it has
        of those.
      num_iterations: number of iterations of the pseudo-inverse.
      query_mask: bool [batch, q_length], the queries that segments are made of; None means
        `mask` where q_length == kv_length (self-attention), otherwise all.
      conv_kernel: float [size, heads], size odd; adds the convolution of the values (0 at padding)
        with it, for self-attention only. The paper uses sizes 33 and 35.
      axis_name: name of a mesh axis, within jax.shard_map. Each device then holds a run of the
        sequence, of the same length, of query, key, value and masks. Only the landmarks, their
        context and the values at the ends of each run cross devices, so the traffic does not grow
        with the length.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit, a mask is not boolean, or an option is out of range.
    """
    del rng
    check_at_least(1, num_landmarks=num_landmarks, num_iterations=num_iterations)
    dtype = value.dtype
    key, value = hide_masked(key, value, mask)
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query_mask, key_mask = masks_or_all(query, key, mask, query_mask)

    whole = shards.num_shards(axis_name)
    num_landmarks = min(num_landmarks, query.shape[1] * whole, key.shape[1] * whole)
    of_queries, of_keys = (shards.running_counts([x], axis_name) for x in (query_mask, key_mask))
    num_segments = jnp.minimum(jnp.minimum(of_queries[1], of_keys[1]), num_landmarks)
    query_means, key_means = (
        segment_means(x, real, num_landmarks, num_segments, *counted, axis_name)
        for x, real, counted in (
            (hide(query, query_mask), query_mask, of_queries),
            (key, key_mask, of_keys),
        )
    )
    valid = jnp.arange(num_landmarks, dtype=jnp.int32)[None] < num_segments[:, None]

    # Landmarks beyond an example's number are removed from A, which gets a 1 on its diagonal there.
    scores = scale * jnp.einsum(
        "bqhp,bkhp->bhqk", query_means, key_means, precision=jax.lax.Precision.HIGHEST
    )
    real_column = valid[:, None, None, :]
    between = jax.nn.softmax(jnp.where(real_column, scores, jnp.finfo(scores.dtype).min), axis=-1)
    real_pair = real_column & valid[:, None, :, None]
    eye = jnp.eye(num_landmarks, dtype=jnp.float32)[None, None]
    a = jnp.where(real_pair, between, eye)
    norms = a.sum(axis=-1).max(axis=-1) * a.sum(axis=-2).max(axis=-1)  # no entry is negative
    z = razavi_iterations(a, a.mT / norms[..., None, None], num_iterations)

    context = attend_to_split_keys(query_means, key, value, key_mask, scale, axis_name)
    context = hide(context, valid)
    weights = jnp.moveaxis(matmul(z, jnp.moveaxis(context, 2, 1)), 1, 2)
    out = softmax_attention(query, key_means, weights, mask=valid, scale=scale)
    if conv_kernel is not None:
        if query.shape[1] != key.shape[1]:
            raise ValueError("nystromformer's convolution needs q_length == kv_length")
        out += convolve_values(value, conv_kernel.astype(jnp.float32), axis_name)
    return out.astype(dtype)


def nystromformer_variables(
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    kv_length: int | None,
    conv_size: int = 0,
) -> dict[str, VariableSpec]:
    """Describes the convolution's kernel, [conv_size, heads]; {} if conv_size is 0."""
    del head_dim, value_dim, kv_length
    return conv_kernel_spec(conv_size, num_heads)
