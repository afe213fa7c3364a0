"""Performer (Choromanski et al., 2021): softmax attention by positive orthogonal random features.

With x = sqrt(s) q or sqrt(s) k and m random directions w_r, the positive features of FAVOR+
(lemma 1 of the paper)

    phi(x)_r = exp(w_r . x - ||x||^2 / 2) / sqrt(m)

satisfy E[phi(x) . phi(y)] = exp(x . y), so that

    out_i = phi(q_i)^T (sum_j phi(k_j) v_j^T) / phi(q_i)^T (sum_j phi(k_j)).
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.inputs import (
    check_at_least,
    check_causal,
    check_not_negative,
    fixed_key,
    hide_masked,
)
from skyformer_jax.attention.prefix_sums import State, empty_state, prefix_attention
from skyformer_jax.attention.row_sums import over_row_sums, with_ones
from skyformer_jax.attention.variables import VariableSpec


def orthogonal_features(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws directions that are orthogonal in blocks of head_dim and each standard normal.

    The orthogonal blocks are uniform, and the lengths are those of independent normal vectors
    (section 2.4 and appendix of the paper).

    Args:
      rng: a jax.random key.
      shape: (num_features, head_dim).

    Returns:
      float32 [num_features, head_dim].
    """
    num_features, head_dim = shape
    block_key, length_key = jax.random.split(rng)
    num_blocks = -(-num_features // head_dim)
    normal = jax.random.normal(block_key, (num_blocks, head_dim, head_dim), jnp.float32)
    blocks = jax.lax.map(_orthogonalise, normal)
    lengths = jnp.linalg.norm(
        jax.random.normal(length_key, shape, jnp.float32), axis=1, keepdims=True
    )
    return blocks.reshape(-1, head_dim)[:num_features] * lengths


def _orthogonalise(matrix: jax.Array) -> jax.Array:
    """Turns a normal matrix [n, n] into a uniform orthogonal one, as jax.random.orthogonal does.

    It takes one matrix at a time, because jaxlib's QR of several matrices can deadlock on CPUs,
    waiting for its own threads.
    """
    q, r = jnp.linalg.qr(matrix)
    return q * jnp.sign(jnp.diagonal(r))[None]


@attention_function()
def performer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    num_features: int = 128,
    projection: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Performer attention (FAVOR+), linear in the length; approaches softmax_attention.

    The error falls as 1 / sqrt(num_features). The greatest exponents, over the keys for each
    feature and over the features for each query, are subtracted before the exponential. They
    cancel in the quotient. So nothing overflows, no denominator vanishes, and no constant has to be
    added.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern. Masked tokens are in neither
        the numerator nor the denominator.
      rng: a jax.random key to draw the projection if it is None; None means a fixed key.
      scale: factor of the scores; None means head_dim**-0.5.
      num_features: m, if projection is None.
      projection: float [m, head_dim], the directions; None draws orthogonal_features.
      is_causal: query i attends to keys 0..i only; see docs/causal.md.
      segment_ids: int [batch, length], for causal attention: positions attend only to their own
        segment. The positions of a segment must be consecutive.
      axis_name: name of a mesh axis, within jax.shard_map. Each device then holds a run of the
        sequence, of the same length, of query, key, value and mask. Only sums over the keys, of
        m x (head_dim + 1) per head, cross devices.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or num_features is less than 1.
    """
    check_at_least(1, num_features=num_features)
    dtype = value.dtype
    key, value = hide_masked(key, value, mask)
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    check_not_negative(scale=scale)
    if projection is None:
        rng = fixed_key() if rng is None else rng
        projection = orthogonal_features(rng, (num_features, head_dim))
    if projection.ndim != 2 or projection.shape[1] != head_dim:
        raise ValueError(
            f"projection must be [num_features, head_dim = {head_dim}]; got {projection.shape}"
        )

    projection = projection.astype(jnp.float32)
    if is_causal or segment_ids is not None:
        check_causal("performer", query, key, is_causal, segment_ids)
        shape = (len(query), query.shape[2], len(projection), value.shape[-1] + 1)
        out, _ = causal_performer(
            query,
            key,
            value,
            mask,
            projection,
            segment_ids,
            empty_state(*shape),
            scale,
            axis_name=axis_name,
        )
        return out.astype(dtype)

    of_keys = _exponents(key, projection, scale)
    if mask is not None:
        of_keys = jnp.where(mask[:, :, None, None], of_keys, -jnp.inf)
    top = shards.pmax(of_keys.max(axis=1, keepdims=True), axis_name)
    top = jnp.maximum(top, jnp.finfo(jnp.float32).min)  # finite even if there is no real key
    key_features = jnp.exp(of_keys - top)
    of_queries = _exponents(query, projection, scale) + top
    query_features = jnp.exp(
        of_queries - jax.lax.stop_gradient(of_queries.max(axis=-1, keepdims=True))
    )
    context = shards.psum(jnp.einsum("bkhm,bkhp->bhmp", key_features, value), axis_name)
    mass = shards.psum(
        key_features.sum(axis=1), axis_name
    )  # at least 1 for each feature, or 0 if there is no real key
    numerator = jnp.einsum("bqhm,bhmp->bqhp", query_features, context)
    denominator = jnp.einsum("bqhm,bhm->bqh", query_features, mass)[..., None]
    return (numerator / jnp.where(denominator > 0, denominator, 1)).astype(dtype)


def _exponents(x: jax.Array, projection: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Exponents W . y - ||y||^2 / 2, [batch, rows, heads, m], with y = sqrt(scale) x."""
    x = x * scale**0.5
    products = jnp.einsum("bnhp,mp->bnhm", x, projection, precision=jax.lax.Precision.HIGHEST)
    return products - 0.5 * (x**2).sum(axis=-1, keepdims=True)


def causal_performer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    projection: jax.Array,
    segment_ids: jax.Array | None,
    state: State,
    scale: jax.Array | float,
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, State]:
    """Computes causal Performer attention for the positions after those of a state.

    The greatest exponent over the keys would depend on later keys. Instead, a constant is
    subtracted from the exponent of each feature of the keys: the exponent is at most ||w||^2 / 2,
    and the constant is the amount by which this exceeds 64, if any.

    Args:
      query: float32 [batch, length, heads, head_dim].
      key: likewise.
      value: float32 [batch, length, heads, value_dim], 0 at masked positions.
      mask: bool [batch, length], or None.
      projection: float32 [m, head_dim].
      segment_ids: as in performer_attention.
      state: empty_state(batch, heads, m, value_dim + 1), or the state from an earlier call.
      scale: factor of the scores.
      axis_name: as in performer_attention.

    Returns:
      float32 [batch, length, heads, value_dim], and the state after the last position.
    """
    top = jnp.maximum(0.5 * (projection**2).sum(axis=-1) - 64, 0)[None, None, None]

    def of_keys(rows: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.exp(_exponents(rows, projection, scale) - top), 1, 2)

    def of_queries(rows: jax.Array) -> jax.Array:
        exponents = _exponents(rows, projection, scale) + top
        greatest = jax.lax.stop_gradient(exponents.max(axis=-1, keepdims=True))
        return jnp.swapaxes(jnp.exp(exponents - greatest), 1, 2)

    out, state = prefix_attention(
        of_queries,
        of_keys,
        query,
        key,
        with_ones(value, mask),
        state=state,
        segment_ids=segment_ids,
        axis_name=axis_name,
    )
    return over_row_sums(out), state


def performer_variables(
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    kv_length: int | None,
    num_features: int = 128,
) -> dict[str, VariableSpec]:
    """Describes the directions, drawn once and kept; a call with an rng redraws them."""
    del num_heads, value_dim, kv_length
    check_at_least(1, num_features=num_features)
    shape = (num_features, head_dim)
    return {"projection": VariableSpec(shape, orthogonal_features, trained=False)}
