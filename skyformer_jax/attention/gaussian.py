"""The Gaussian-kernel primitive, and Kernelized Attention (Chen et al., 2021, section 4.1).

Everything of Skyformer stands on one operation, for p = head_dim:

    G(q, k) v:  out_i = sum_j exp(-scale/2 * ||q_i - k_j||^2) v_j
"""

import functools

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import check_and_hide_masked

# Query rows whose scores exist at the same time. Chosen so that, at the lengths of the Long Range
# Arena, a block of scores stays in the processor's caches; not a limit on the length.
_QUERY_BLOCK = 512


def gaussian_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """Gaussian kernel values exp(-scale/2 * ||q_i - k_j||^2).

    The product is taken at the highest precision: the exponent is a difference of larger numbers,
    and what TF32 or bfloat16 would lose in it comes out multiplied.

    Args:
      query: float32 [batch, q_length, heads, head_dim].
      key: float32 [batch, kv_length, heads, head_dim].
      scale: the kernel's inverse squared width.

    Returns:
      float32 [batch, heads, q_length, kv_length], in 0..1.
    """
    products = jnp.einsum("bqhp,bkhp->bhqk", query, key, precision=jax.lax.Precision.HIGHEST)
    query_norms = jnp.einsum("bqhp,bqhp->bhq", query, query)[..., :, None]
    key_norms = jnp.einsum("bkhp,bkhp->bhk", key, key)[..., None, :]
    exponent = scale * (products - 0.5 * (query_norms + key_norms))
    return jnp.exp(jnp.minimum(exponent, 0))  # rounding alone can make it positive


def gaussian_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float
) -> jax.Array:
    """G(query, key) value, never holding more than a block of query rows of the scores.

    Blocks are recomputed in the backward pass, so memory is linear in q_length + kv_length for
    gradients too.

    Args:
      query: float32 [batch, q_length, heads, head_dim].
      key: float32 [batch, kv_length, heads, head_dim].
      value: float32 [batch, kv_length, heads, head_dim]; 0 where masked, which is all that a
        mask has to do here, since nothing normalises the sum.
      scale: the kernel's inverse squared width.

    Returns:
      float32 [batch, q_length, heads, head_dim].
    """

    def rows(block: jax.Array) -> jax.Array:
        return jnp.einsum("bhqk,bkhp->bqhp", gaussian_scores(block, key, scale), value)

    batch, q_length, heads, head_dim = query.shape
    if q_length <= _QUERY_BLOCK:
        return rows(query)
    num_blocks = -(-q_length // _QUERY_BLOCK)
    padding = num_blocks * _QUERY_BLOCK - q_length
    padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, num_blocks, _QUERY_BLOCK, heads, head_dim)
    out = jax.lax.map(jax.checkpoint(rows), jnp.moveaxis(blocks, 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :q_length]


def kernelized_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: float | None = None,
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

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit or the mask is not boolean.
    """
    del rng
    dtype = value.dtype
    key, value = check_and_hide_masked(query, key, value, mask)
    attend = functools.partial(
        gaussian_attention, scale=query.shape[-1] ** -0.5 if scale is None else scale
    )
    return attend(*(x.astype(jnp.float32) for x in (query, key, value))).astype(dtype)
