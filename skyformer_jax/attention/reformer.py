"""Reformer (Kitaev et al., 2020): softmax attention within buckets of locality-sensitive hashing.

Queries and keys are one (section 2, "shared-QK"): k_j = q_j / ||q_j||. A round of hashing gives
each token the bucket argmax([x R; -x R]) for a random R, sorts the tokens by bucket, and cuts them
into chunks. A token attends to those of its own bucket in its own chunk and the one before:

    P_i = {j : bucket_j = bucket_i, chunk_j in {chunk_i - 1, chunk_i}}.

Several rounds attend to the union of their P_i (appendix A of the paper): with N_ij the number of
rounds that have j in P_i,

    o_i^r = sum_j exp(s q_i . k_j - m_ij - z_i^r) v_j,   m_ij = 1e5 where i = j, else log N_ij
    out_i = sum_r exp(z_i^r - logsumexp_r z_i^r) o_i^r,

z_i^r being the log-normaliser of round r. The 1e5 lets a token attend to itself only when there is
no other. The scale s is 1, though the paper writes 1 / sqrt(head_dim) in its equation 1: the code
that its authors published, Hugging Face's, and Skyformer's all divide by the norm of the key alone.
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.inputs import (
    check_at_least,
    fixed_key,
    hide_masked,
)
from skyformer_jax.attention.variables import VariableSpec

_SELF_PENALTY = 1e5
_EPSILON = 1e-12  # of squared norms, for a token that is all zeros

# Columns of the rotations that a layer keeps: enough for the buckets of 64 * 512 tokens, and for
# longer sequences, whose buckets then grow with the length.
_KEPT_COLUMNS = 512


def default_num_buckets(length: int, chunk_length: int) -> int:
    """Two buckets a chunk, as in the paper; one where everything is in one chunk."""
    num_chunks = -(-length // chunk_length)
    return 1 if num_chunks == 1 else 2 * num_chunks


def hash_buckets(rows: jax.Array, rotations: jax.Array, num_buckets: int) -> jax.Array:
    """Angular locality-sensitive hashing (Andoni et al., 2015).

    Args:
      rows: [batch, length, heads, head_dim].
      rotations: [rounds, head_dim, at least num_buckets // 2].
      num_buckets: 1, or even.

    Returns:
      int32 [batch, heads, rounds, length], in 0..num_buckets-1.
    """
    projected = jnp.einsum(
        "bnhp,rpc->bhrnc",
        rows,
        rotations[:, :, : max(1, num_buckets // 2)].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    both = jnp.concatenate([projected, -projected], axis=-1)
    return both[..., :num_buckets].argmax(axis=-1).astype(jnp.int32)


@attention_function(self_attention_only=True, shared_query_key=True)
def reformer_attention(
    query: jax.Array,
    key: jax.Array | None = None,
    value: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = 1.0,
    num_hashes: int = 2,
    chunk_length: int = 64,
    num_buckets: int | None = None,
    rotations: jax.Array | None = None,
) -> jax.Array:
    """Reformer self-attention (LSH attention) with shared queries and keys, for any length.

    With one bucket and one chunk it is softmax attention of q_i to q_j / ||q_j||, a token itself
    left out unless it is the only one. Memory and time are those of 2 * chunk_length keys for each
    query and round.

    Args:
      query: [batch, length, heads, head_dim], unscaled; queries and keys at once.
      key: None, or the same array as query.
      value: [batch, length, heads, head_dim].
      mask: bool [batch, length], True at real tokens; any pattern. Padding is sorted to the end,
        and is in nobody's P_i.
      rng: a jax.random key to draw rotations that are not given; None takes a fixed key.
      scale: factor of the scores q_i . q_j / ||q_j||; 1 as published. None means head_dim**-0.5,
        with which the weights of queries of unit variance are nearly uniform.
      num_hashes: rounds, where rotations are not given.
      chunk_length: tokens of a chunk; the sequence is padded to a multiple of it.
      num_buckets: 1 or an even number; None means default_num_buckets, at most what rotations
        have columns for.
      rotations: float [rounds, head_dim, columns], shared by the heads, columns at least
        num_buckets / 2 (the first ones count); None draws normal ones.

    Returns:
      [batch, length, heads, head_dim] in the dtype of value, computed in float32; zeros at
      padding.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, key is another array than query,
        or an option is out of range.
    """
    assert value is not None  # the decorator has checked it, and key
    check_at_least(1, num_hashes=num_hashes, chunk_length=chunk_length)
    dtype = value.dtype
    query, value = hide_masked(query, value, mask)  # as the key is hidden
    batch, length, _, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    chunk_length = min(chunk_length, length)
    num_buckets = _choose_num_buckets(num_buckets, length, chunk_length, rotations)
    if rotations is None:
        rng = fixed_key() if rng is None else rng
        columns = max(1, num_buckets // 2)
        rotations = _draw_rotations(rng, (num_hashes, head_dim, columns))
    _check_rotations(rotations, head_dim, num_buckets)

    padding = ((0, 0), (0, -length % chunk_length))
    real = jnp.pad(jnp.ones((batch, length), bool) if mask is None else mask, padding)
    query, value = (
        jnp.pad(x.astype(jnp.float32), (*padding, (0, 0), (0, 0))) for x in (query, value)
    )
    # Padding sorts behind every bucket.
    buckets = hash_buckets(jax.lax.stop_gradient(query), rotations, num_buckets)
    buckets = jnp.where(real[:, None, None, :], buckets, num_buckets)
    out = _attend_in_chunks(query, value, real, buckets, chunk_length, scale)
    return out[:, :length].astype(dtype)


def _draw_rotations(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(rng, shape, jnp.float32)


def _choose_num_buckets(
    num_buckets: int | None, length: int, chunk_length: int, rotations: jax.Array | None
) -> int:
    """num_buckets, or its default; ValueError unless it is 1 or even."""
    if num_buckets is None:
        num_buckets = default_num_buckets(length, chunk_length)
        if rotations is not None:
            num_buckets = min(num_buckets, 2 * rotations.shape[-1])
    check_at_least(1, num_buckets=num_buckets)
    if num_buckets > 1 and num_buckets % 2:
        raise ValueError(f"num_buckets must be 1 or an even number; got {num_buckets}")
    return num_buckets


def _check_rotations(rotations: jax.Array, head_dim: int, num_buckets: int) -> None:
    if rotations.ndim != 3 or rotations.shape[1] != head_dim:
        raise ValueError(
            f"rotations must be [rounds, head_dim = {head_dim}, columns]; got {rotations.shape}"
        )
    if 2 * rotations.shape[2] < num_buckets:
        raise ValueError(
            f"num_buckets={num_buckets} needs rotations of {num_buckets // 2} columns; "
            f"got {rotations.shape}"
        )


def _attend_in_chunks(
    query: jax.Array,
    value: jax.Array,
    real: jax.Array,
    buckets: jax.Array,
    chunk_length: int,
    scale: jax.Array | float,
) -> jax.Array:
    """The attention of all rounds of hashing, combined.

    Args:
      query: float32 [batch, length, heads, head_dim], length a multiple of chunk_length.
      value: float32, likewise.
      real: bool [batch, length], True at real tokens.
      buckets: int [batch, heads, rounds, length]; padding has the greatest.
      chunk_length: tokens of a chunk.
      scale: factor of the scores.

    Returns:
      float32 [batch, length, heads, head_dim].
    """
    batch, length, heads, _ = query.shape
    num_chunks = length // chunk_length
    key = query * jax.lax.rsqrt((query**2).sum(axis=-1, keepdims=True) + _EPSILON)

    # All below is [batch, heads, rounds, ...].
    order = jnp.argsort(buckets, axis=-1)  # stable: by position within a bucket
    slots = jnp.argsort(order, axis=-1)  # where the order has put each position
    num_rounds = order.shape[2]

    def in_chunks(x: jax.Array) -> jax.Array:
        """[batch, heads, length, c] -> [batch, heads, rounds, chunks, chunk_length, c], sorted."""
        x = jnp.take_along_axis(x[:, :, None], order[..., None], axis=3)
        return x.reshape(*order.shape[:3], num_chunks, chunk_length, x.shape[-1])

    def with_previous(x: jax.Array) -> jax.Array:
        """Each chunk behind the one before; the first's is the last, which no P_i has."""
        return x if num_chunks == 1 else jnp.concatenate([jnp.roll(x, 1, axis=3), x], axis=4)

    # For the pairs that this round has side by side, in which rounds is j in P_i?
    bucket, chunk = (in_chunks(jnp.moveaxis(x, 2, -1)) for x in (buckets, slots // chunk_length))
    behind = chunk[..., :, None, :] - with_previous(chunk)[..., None, :, :]
    same_bucket = bucket[..., :, None, :] == with_previous(bucket)[..., None, :, :]
    attends = same_bucket & (behind >= 0) & (behind <= 1)  # [..., chunk, keys, all rounds]
    count = attends.sum(axis=-1)
    own_round = jnp.eye(num_rounds, dtype=bool)[None, None, :, None, None, None, :]
    here = (attends & own_round).any(axis=-1)
    here &= in_chunks(jnp.broadcast_to(real[:, None, :, None], (batch, heads, length, 1)))
    position = order.reshape(*order.shape[:3], num_chunks, chunk_length, 1)
    itself = position == with_previous(position)[..., 0][..., None, :]

    chunk_query, chunk_key, chunk_value = (
        in_chunks(jnp.moveaxis(x, 2, 1)) for x in (query, key, value)
    )
    scores = scale * jnp.einsum(
        "bhrcip,bhrcjp->bhrcij",
        chunk_query,
        with_previous(chunk_key),
        precision=jax.lax.Precision.HIGHEST,
    )
    scores -= jnp.where(itself, _SELF_PENALTY, jnp.log(jnp.maximum(count, 1).astype(jnp.float32)))
    scores = jnp.where(here, scores, jnp.finfo(scores.dtype).min)
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.where(here, jnp.exp(scores - normaliser), 0)
    out = jnp.einsum("bhrcij,bhrcjp->bhrcip", weights, with_previous(chunk_value))

    def unsorted(x: jax.Array) -> jax.Array:
        x = x.reshape(*order.shape, x.shape[-1])
        return jnp.take_along_axis(x, slots[..., None], axis=3)

    of_round = jax.nn.softmax(unsorted(normaliser), axis=2)
    out = (of_round * unsorted(out)).sum(axis=2)
    return jnp.moveaxis(out, 1, 2)


def reformer_variables(
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    kv_length: int | None,
    num_hashes: int = 2,
) -> dict[str, VariableSpec]:
    """The rotations, drawn once and kept; a call with an rng redraws them."""
    del num_heads, value_dim, kv_length
    check_at_least(1, num_hashes=num_hashes)
    shape = (num_hashes, head_dim, _KEPT_COLUMNS)
    return {"rotations": VariableSpec(shape, _draw_rotations, trained=False)}
