"""Reformer (Kitaev et al., 2020): softmax attention within buckets of locality-sensitive hashing.

Queries and keys are one (section 2, "shared-QK"): k_j = q_j / ||q_j||. A round of hashing gives
each token the bucket argmax([x R; -x R]) for a random R (for many buckets, several such numbers
together), sorts the tokens by bucket, and cuts them into chunks. A token attends to those of its
own bucket in its own chunk and the one before:

    P_i = {j : bucket_j = bucket_i, chunk_j in {chunk_i - 1, chunk_i}}.

Several rounds attend to the union of their P_i (appendix A of the paper): with N_ij the number of
rounds that have j in P_i,

    o_i^r = sum_j exp(s q_i . k_j - m_ij - z_i^r) v_j,   m_ij = 1e5 where i = j, else log N_ij
    out_i = sum_r exp(z_i^r - logsumexp_r z_i^r) o_i^r,

z_i^r being the log-normaliser of round r. The 1e5 lets a token attend to itself only when there is
no other. The scale s is 1, though the paper writes 1 / sqrt(head_dim) in its equation 1: the code
that its authors published, Hugging Face's, and Skyformer's all divide by the norm of the key alone.
"""

import math

import jax
import jax.numpy as jnp

from skyformer_jax.attention import permutations
from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.inputs import (
    check_at_least,
    fixed_key,
    hide_masked,
)
from skyformer_jax.attention.variables import VariableSpec

_SELF_PENALTY = 1e5
_NOT_ATTENDED = 1e30
_EPSILON = 1e-12  # of squared norms, for a token that is all zeros

# Buckets that one hash gives; for more, smaller hashes are combined. That is the threshold of
# Hugging Face's code too, by default.
_MOST_BUCKETS = 128

# Columns of the rotations that a layer keeps: enough for factorized hashes at any length. One that
# is not has at most 1,024 buckets by them, which grow with the length beyond 32,768 tokens.
_KEPT_COLUMNS = 512


def default_num_buckets(length: int, chunk_length: int) -> int:
    """Two buckets a chunk, as in the paper; one where everything is in one chunk."""
    num_chunks = -(-length // chunk_length)
    return 1 if num_chunks == 1 else 2 * num_chunks


def hash_factors(num_buckets: int) -> tuple[int, ...]:
    """How many buckets each of the hashes has that a round combines.

    A hash costs half the sum of its factors, so that it grows with the logarithm of num_buckets.

    Args:
      num_buckets: 1, or even.

    Returns:
      (num_buckets,) up to 128. Beyond, as few even numbers up to 128 as have a product of
      num_buckets or more, about equal: (16, 32) for 512, as in Hugging Face's code.
    """
    if num_buckets <= _MOST_BUCKETS:
        return (num_buckets,)
    bits = (num_buckets - 1).bit_length()
    first = 1 << bits // -(-bits // (_MOST_BUCKETS.bit_length() - 1))
    return first, *hash_factors(2 * -(-num_buckets // (2 * first)))


def hash_buckets(rows: jax.Array, rotations: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Angular locality-sensitive hashing (Andoni et al., 2015), of several hashes combined.

    The hash of f buckets is argmax([x R; -x R]), R having f / 2 columns, and bucket = hash_1 +
    factors[0] * (hash_2 + factors[1] * ...), as in the authors' code (factorize_hash in trax).

    Args:
      rows: [batch, length, heads, head_dim].
      rotations: [rounds, head_dim, at least half the sum of factors], each hash's columns in turn.
      factors: buckets of each hash, all even; (1,) is one bucket.

    Returns:
      int32 [batch, heads, rounds, length], in 0..prod(factors)-1.
    """
    batch, length, heads, _ = rows.shape
    buckets = jnp.zeros((batch, heads, rotations.shape[0], length), jnp.int32)
    if factors == (1,):
        return buckets
    columns = num_columns(factors)
    # The columns before the last axis: CPUs and TPUs then reduce many tokens at a time.
    projected = jnp.einsum(
        "bnhp,rpc->bhrcn",
        rows,
        rotations[:, :, :columns].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    stride, begin = 1, 0
    for factor in factors:
        end = begin + factor // 2
        buckets += stride * _signed_argmax(projected[..., begin:end, :])
        stride, begin = stride * factor, end
    return buckets


def num_columns(factors: tuple[int, ...]) -> int:
    """Columns of the rotations that hashes of so many buckets take."""
    return sum(max(1, factor // 2) for factor in factors)


def _signed_argmax(x: jax.Array) -> jax.Array:
    """argmax([x; -x]) over the axis before the last, by reductions that compilers do fast."""
    columns = x.shape[-2]
    greatest, least = x.max(axis=-2), x.min(axis=-2)
    negative = -least > greatest
    extreme = jnp.where(negative, least, greatest)[..., None, :]
    column = jnp.arange(columns, dtype=jnp.int32)[:, None]
    first = jnp.where(x == extreme, column, columns - 1).min(axis=-2)
    return jnp.where(negative, first + columns, first)


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
    factorize_hash: bool = True,
    rotations: jax.Array | None = None,
) -> jax.Array:
    """Reformer self-attention (LSH attention) with shared queries and keys, for any length.

    With one bucket and one chunk it is softmax attention of q_i to q_j / ||q_j||, a token itself
    left out unless it is the only one. Memory and time are those of 2 * chunk_length keys for each
    query and round, and of hashing and sorting: in all length * log(length), if factorize_hash.

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
      num_buckets: 1 or an even number; None means default_num_buckets, or twice the columns of
        rotations that have too few for it. The next product of hash_factors where it is factorized.
      factorize_hash: whether more than 128 buckets come from several hashes, those of hash_factors,
        as the published codes do for long sequences. By one hash, time and memory grow with
        length * num_buckets, with the default number as the square of the length.
      rotations: float [rounds, head_dim, columns], shared by the heads, columns at least
        num_buckets / 2, or half the sum of the factors (the first ones count); None draws normal
        ones.

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
    factors = _choose_factors(num_buckets, factorize_hash, length, chunk_length, rotations)
    if rotations is None:
        rng = fixed_key() if rng is None else rng
        rotations = _draw_rotations(rng, (num_hashes, head_dim, num_columns(factors)))
    _check_rotations(rotations, head_dim, factors)

    padding = ((0, 0), (0, -length % chunk_length))
    real = jnp.pad(jnp.ones((batch, length), bool) if mask is None else mask, padding)
    query, value = (
        jnp.pad(x.astype(jnp.float32), (*padding, (0, 0), (0, 0))) for x in (query, value)
    )
    # Padding sorts behind every bucket.
    buckets = hash_buckets(jax.lax.stop_gradient(query), rotations, factors)
    buckets = jnp.where(real[:, None, None, :], buckets, math.prod(factors))
    out = _attend_in_chunks(query, value, buckets, chunk_length, scale)
    return out[:, :length].astype(dtype)


def _draw_rotations(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(rng, shape, jnp.float32)


def _choose_factors(
    num_buckets: int | None,
    factorize_hash: bool,
    length: int,
    chunk_length: int,
    rotations: jax.Array | None,
) -> tuple[int, ...]:
    """Those of num_buckets, or of its default; ValueError unless it is 1 or even."""

    def factors(num_buckets: int) -> tuple[int, ...]:
        return hash_factors(num_buckets) if factorize_hash else (num_buckets,)

    if num_buckets is None:
        num_buckets = default_num_buckets(length, chunk_length)
        if rotations is not None and rotations.shape[-1] < num_columns(factors(num_buckets)):
            num_buckets = 2 * rotations.shape[-1]
    check_at_least(1, num_buckets=num_buckets)
    if num_buckets > 1 and num_buckets % 2:
        raise ValueError(f"num_buckets must be 1 or an even number; got {num_buckets}")
    return factors(num_buckets)


def _check_rotations(rotations: jax.Array, head_dim: int, factors: tuple[int, ...]) -> None:
    if rotations.ndim != 3 or rotations.shape[1] != head_dim:
        raise ValueError(
            f"rotations must be [rounds, head_dim = {head_dim}, columns]; got {rotations.shape}"
        )
    if rotations.shape[2] < num_columns(factors):
        raise ValueError(
            f"num_buckets={math.prod(factors)} needs rotations of {num_columns(factors)} columns; "
            f"got {rotations.shape}"
        )


def _attend_in_chunks(
    query: jax.Array,
    value: jax.Array,
    buckets: jax.Array,
    chunk_length: int,
    scale: jax.Array | float,
) -> jax.Array:
    """The attention of all rounds of hashing, combined.

    Written for what devices do well: a token's query and value move as one row, numbers of tokens
    stand in arrays of their own, and the rounds are combined by weights relative to the greatest
    score of a token in any of them.

    Args:
      query: float32 [batch, length, heads, head_dim], length a multiple of chunk_length.
      value: float32, likewise; zeros at padding, which attends to padding only.
      buckets: int32 [batch, heads, rounds, length]; padding has the greatest.
      chunk_length: tokens of a chunk.
      scale: factor of the scores.

    Returns:
      float32 [batch, length, heads, head_dim].
    """
    head_dim = query.shape[-1]
    order = permutations.sorted_order(buckets)  # stable: by position within a bucket
    slots = permutations.inverse(order)  # where the order has put each position

    # All below is [batch, heads, rounds, ...].
    def in_chunks(x: jax.Array) -> jax.Array:
        """[..., length, ...] -> [..., chunks, chunk_length, ...]."""
        return x.reshape(*x.shape[:3], -1, chunk_length, *x.shape[4:])

    ones = jnp.ones((*value.shape[:3], 1), value.dtype)  # their product is the sum of the weights
    rows = jnp.moveaxis(jnp.concatenate([query, value, ones], axis=-1), 2, 1)
    rows = _with_previous(in_chunks(permutations.rows_in_orders(rows, order, slots)))
    query = rows[..., -chunk_length:, :head_dim]
    key, value = rows[..., :head_dim], rows[..., head_dim:]
    key *= scale * jax.lax.rsqrt((key**2).sum(axis=-1, keepdims=True) + _EPSILON)
    scores = jnp.einsum(
        "bhrcip,bhrcjp->bhrcij", query, key, precision=jax.lax.Precision.HIGHEST
    ) - _penalties(buckets, order, slots, chunk_length)

    greatest = scores.max(axis=-1).reshape(order.shape)
    greatest = permutations.numbers_in_order(greatest, slots, order).max(axis=2, keepdims=True)
    greatest = jnp.broadcast_to(greatest, order.shape)
    greatest = in_chunks(permutations.numbers_in_order(greatest, order, slots))
    weights = jnp.exp(scores - greatest[..., None])
    out = jnp.einsum("bhrcij,bhrcjp->bhrcip", weights, value)
    out = permutations.sum_of_rows(out.reshape(*order.shape, -1), order, slots)
    return jnp.moveaxis(out[..., :-1] / out[..., -1:], 1, 2)


def _with_previous(x: jax.Array) -> jax.Array:
    """Each chunk of [..., chunks, chunk_length, ...], axes 3 and 4, behind the one before.

    That of the first is the last, which no P_i has. A lone chunk stays alone.
    """
    return x if x.shape[3] == 1 else jnp.concatenate([jnp.roll(x, 1, axis=3), x], axis=4)


def _penalties(
    buckets: jax.Array, order: jax.Array, slots: jax.Array, chunk_length: int
) -> jax.Array:
    """m_ij, _NOT_ATTENDED where j is not in the P_i of the round.

    Args:
      buckets: int32 [batch, heads, rounds, length].
      order: the order of each round, likewise.
      slots: its inverse.
      chunk_length: tokens of a chunk.

    Returns:
      float32 [batch, heads, rounds, chunks, chunk_length, keys].
    """
    # Along a round's order neither bucket nor chunk falls. So j is in P_i just where the sum of
    # 2 * bucket + chunk is, for i, greater by 0 or 1.
    places = 2 * buckets + slots // chunk_length

    def attends(places: jax.Array) -> jax.Array:
        places = permutations.numbers_in_order(places, order, slots)
        places = places.reshape(*order.shape[:3], -1, chunk_length)
        behind = places[..., :, None] - _with_previous(places)[..., None, :]
        return (behind & ~1) == 0

    here = attends(places)
    num_rounds = order.shape[2]
    count = jnp.zeros(here.shape, jnp.int32)  # N_ij
    for i in range(num_rounds):
        of_round = jnp.broadcast_to(places[:, :, i : i + 1], places.shape)
        count += attends(of_round).astype(jnp.int32)
    penalties = jnp.zeros(here.shape, jnp.float32)
    for number in range(2, num_rounds + 1):
        penalties = jnp.where(count == number, math.log(number), penalties)
    penalties = jnp.where(here, penalties, _NOT_ATTENDED)
    keys = here.shape[-1]
    itself = jnp.eye(chunk_length, keys, keys - chunk_length, dtype=bool)
    return jnp.where(itself, _SELF_PENALTY, penalties)


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
