"""Informer (Zhou et al., 2021): softmax attention for the queries whose weights are least uniform.

ProbSparse self-attention (algorithm 1 of the paper): with a sample K' of the keys, the measure

    M(q) = max_j (q . k'_j s) - mean_j (q . k'_j s)

ranks the queries. The u queries with the greatest M get softmax(q K^T s) V. The others, whose
weights are assumed uniform, get the mean of V.
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.inputs import (
    check_at_least,
    hide,
    hide_masked,
    take_rows,
)
from skyformer_jax.attention.landmarks import strided_landmarks, uniform_landmarks
from skyformer_jax.attention.softmax import softmax_attention


@attention_function(self_attention_only=True)
def informer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    num_active_queries: int = 128,
    num_sampled_keys: int = 128,
) -> jax.Array:
    """ProbSparse self-attention, linear in the length for fixed numbers of queries and keys.

    If all queries are active it equals softmax_attention. In the paper both numbers grow as the
    logarithm of the length.

    Args:
      query: [batch, length, heads, head_dim], unscaled.
      key: [batch, length, heads, head_dim].
      value: [batch, length, heads, head_dim].
      mask: bool [batch, length], True at real tokens; any pattern. It applies to the queries too:
        queries at padding are active only if all real ones are.
      rng: a jax.random key to sample keys with; None spaces the sample evenly over the real keys.
      scale: factor of the scores; None means head_dim**-0.5.
      num_active_queries: u, the number of active queries per head of each example.
      num_sampled_keys: the number of keys of each example that the measure M uses.

    Returns:
      [batch, length, heads, head_dim] in the dtype of value; zeros for an example without any
      real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or an option is less than 1.
    """
    check_at_least(1, num_active_queries=num_active_queries, num_sampled_keys=num_sampled_keys)
    key, value = hide_masked(key, value, mask)
    batch, length = query.shape[:2]
    real = jnp.ones((batch, length), bool) if mask is None else mask
    query = hide(query, real)

    num_sampled_keys = min(num_sampled_keys, length)
    if rng is None:
        indices, valid = strided_landmarks(real, num_sampled_keys)
    else:
        indices, valid = uniform_landmarks(rng, real, num_sampled_keys)
    sample = take_rows(key, indices)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum(
        "bqhp,bkhp->bhqk",
        query.astype(jnp.float32),
        sample.astype(jnp.float32) * factor,
        precision=jax.lax.Precision.HIGHEST,
    )
    valid = valid[:, None, None, :]
    top = jnp.where(valid, scores, -jnp.inf).max(axis=-1)
    num_valid = jnp.maximum(valid.sum(axis=-1), 1).astype(jnp.float32)
    mean = jnp.where(valid, scores, 0).sum(axis=-1) / num_valid
    measure = jnp.where(real[:, None, :], top - mean, -jnp.inf)  # [batch, heads, length]
    measure = jax.lax.stop_gradient(measure)

    _, active = jax.lax.top_k(measure, min(num_active_queries, length))  # [batch, heads, u]
    # TPUs gather and scatter rows that differ by head one at a time. There, products with matrices
    # of zeros and ones are used, which cost no more than the attention of these rows.
    chosen = jax.lax.platform_dependent(query, active, tpu=_gather_by_product, default=_gather)
    attended = softmax_attention(chosen, key, value, mask=mask, scale=scale)
    count = jnp.maximum(real.sum(axis=1), 1)[:, None, None, None].astype(jnp.float32)
    mean_value = value.astype(jnp.float32).sum(axis=1, keepdims=True) / count
    default = jnp.broadcast_to(mean_value.astype(value.dtype), value.shape)
    return jax.lax.platform_dependent(
        default, active, attended, tpu=_scatter_by_product, default=_scatter
    )


def _gather(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Gathers different rows for each head.

    Args:
      x: [batch, length, heads, head_dim].
      indices: int [batch, heads, u], distinct within a head.

    Returns:
      [batch, u, heads, head_dim].
    """
    return jnp.take_along_axis(x, jnp.moveaxis(indices, 1, 2)[..., None], axis=1)


def _gather_by_product(x: jax.Array, indices: jax.Array) -> jax.Array:
    return _product("bhun,bnhp->buhp", _one_hot(indices, x.shape[1]), x)


def _scatter(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [batch, u, heads, head_dim] to the places that _gather reads."""

    def place(x: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        return x.at[at].set(rows)

    per_head = jax.vmap(place, in_axes=(1, 0, 1), out_axes=1)
    return jax.vmap(per_head)(x, indices, rows)


def _scatter_by_product(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    one_hot = _one_hot(indices, x.shape[1])
    here = jnp.moveaxis(one_hot.any(axis=2), 1, 2)[..., None]
    return jnp.where(here, _product("bhun,buhp->bnhp", one_hot, rows), x)


def _one_hot(indices: jax.Array, length: int) -> jax.Array:
    """Bool [..., u, length]: the one-hot encoding of the indices [..., u]."""
    rows = jnp.arange(length, dtype=indices.dtype)
    return indices[..., None] == jnp.expand_dims(rows, range(indices.ndim))


def _product(subscripts: str, one_hot: jax.Array, rows: jax.Array) -> jax.Array:
    """The product of a one-hot matrix with rows, exact to rounding, in the dtype of rows."""
    one_hot, of_rows = one_hot.astype(jnp.float32), rows.astype(jnp.float32)
    product = jnp.einsum(subscripts, one_hot, of_rows, precision=jax.lax.Precision.HIGHEST)
    return product.astype(rows.dtype)
