"""Reformer (Kitaev et al., 2020): softmax attention within buckets of locality-sensitive hashing.

Queries and keys are shared (section 2, "shared-QK"): k_j = q_j / ||q_j||. A round of hashing gives
each token the bucket argmax([x R; -x R]) for a random R (if there are many buckets, it combines
several such numbers), sorts the tokens by bucket, and splits them into chunks. A token attends to
the tokens of its own bucket in its own chunk and the one before:

    P_i = {j : bucket_j = bucket_i, chunk_j in {chunk_i - 1, chunk_i}}.

Several rounds attend to the union of their P_i (appendix A of the paper). With N_ij the number of
rounds that have j in P_i,

    o_i^r = sum_j exp(s q_i . k_j - m_ij - z_i^r) v_j,   m_ij = 1e5 where i = j, else log N_ij
    out_i = sum_r exp(z_i^r - logsumexp_r z_i^r) o_i^r,

where z_i^r is the log-normaliser of round r. The 1e5 lets a token attend to itself only if there is
no other. The scale s is 1, although the paper writes 1 / sqrt(head_dim) in its equation 1: the code
published by its authors, Hugging Face's, and Skyformer's all divide only by the norm of the key.
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

# The most buckets of a single hash; for more buckets, smaller hashes are combined. This is also the
# default threshold of Hugging Face's code.
_MOST_BUCKETS = 128

# Columns of the rotations that a layer keeps: enough for factorized hashes at any length. A hash
# that is not factorized has at most 1,024 buckets with them, so beyond 32,768 tokens the size of
# its buckets grows with the length.
_KEPT_COLUMNS = 512


def default_num_buckets(length: int, chunk_length: int) -> int:
    """Returns two buckets per chunk, as in the paper, or one bucket if there is one chunk."""
    num_chunks = -(-length // chunk_length)
    return 1 if num_chunks == 1 else 2 * num_chunks


def hash_factors(num_buckets: int) -> tuple[int, ...]:
    """Returns the number of buckets of each hash that a round combines.

    The cost of hashing is half the sum of the factors, so it grows with the logarithm of
    num_buckets.

    Args:
      num_buckets: 1, or an even number.

    Returns:
      (num_buckets,) up to 128. Beyond that, as few even numbers of at most 128 as possible, about
      equal, whose product is at least num_buckets: (16, 32) for 512, as in Hugging Face's code.
    """
    if num_buckets <= _MOST_BUCKETS:
        return (num_buckets,)
    bits = (num_buckets - 1).bit_length()
    first = 1 << bits // -(-bits // (_MOST_BUCKETS.bit_length() - 1))
    return first, *hash_factors(2 * -(-num_buckets // (2 * first)))


def hash_buckets(rows: jax.Array, rotations: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Computes buckets by angular locality-sensitive hashing (Andoni et al., 2015).

    A hash of f buckets is argmax([x R; -x R]) where R has f / 2 columns. Several hashes combine to
    bucket = hash_1 + factors[0] * (hash_2 + factors[1] * ...), as in the authors' code
    (factorize_hash in trax).

    Args:
      rows: [batch, length, heads, head_dim].
      rotations: [rounds, head_dim, columns]; the columns of the hashes follow each other, at least
        half the sum of factors in all.
      factors: the number of buckets of each hash, all even; (1,) means one bucket.

    Returns:
      int32 [batch, heads, rounds, length], in 0..prod(factors)-1.
    """
    batch, length, heads, _ = rows.shape
    buckets = jnp.zeros((batch, heads, rotations.shape[0], length), jnp.int32)
    if factors == (1,):
        return buckets
    columns = num_columns(factors)
    # Columns come before the last axis, so that CPUs and TPUs reduce many tokens at a time.
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
    """Returns the number of columns of the rotations that hashes with these factors need."""
    return sum(max(1, factor // 2) for factor in factors)


def _signed_argmax(x: jax.Array) -> jax.Array:
    """argmax([x; -x]) over the axis before the last, by reductions that compile to fast code."""
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

    With one bucket and one chunk it equals softmax attention of q_i to q_j / ||q_j||, except that a
    token does not attend to itself unless it is the only one. Memory and time are those of
    2 * chunk_length keys for each query and round, and of hashing and sorting: length * log(length)
    in total, if factorize_hash.

    Args:
      query: [batch, length, heads, head_dim], unscaled; both queries and keys.
      key: None, or the same array as query.
      value: [batch, length, heads, head_dim].
      mask: bool [batch, length], True at real tokens; any pattern. Padding is sorted to the end,
        and real tokens never attend to it.
      rng: a jax.random key to draw the rotations if they are None; None means a fixed key.
      scale: factor of the scores q_i . q_j / ||q_j||; 1 as published. None means head_dim**-0.5,
        with which the weights of queries of unit variance are nearly uniform.
      num_hashes: the number of rounds, if rotations is None.
      chunk_length: tokens of a chunk; the sequence is padded to a multiple of it.
      num_buckets: 1 or an even number. None means default_num_buckets, or twice the columns of
        rotations if these are too few for it. If the hash is factorized, the number is rounded up
        to the product of hash_factors.
      factorize_hash: whether more than 128 buckets come from several hashes, those of hash_factors,
        as in the published implementations for long sequences. With a single hash, time and memory
        grow with length * num_buckets; for the default number, as the square of the length.
      rotations: float [rounds, head_dim, columns], shared by the heads, with at least
        num_buckets / 2 columns, or half the sum of the factors if the hash is factorized (only the
        first ones are used); None draws normal ones.

    Returns:
      [batch, length, heads, head_dim] in the dtype of value, computed in float32; zeros at
      padding.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, key is another array than query,
        or an option is out of range.
    """
    assert value is not None  # the decorator has checked value and key
    check_at_least(1, num_hashes=num_hashes, chunk_length=chunk_length)
    dtype = value.dtype
    query, value = hide_masked(query, value, mask)  # the query is also the key
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
    # Padding gets a bucket of its own, behind all others.
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
    """Factors of num_buckets or of its default; ValueError unless num_buckets is 1 or even."""

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
    """Computes the attention of all rounds of hashing and combines them.

    It is written for speed on accelerators and CPUs: a token's query and value move as one row, and
    per-token numbers are kept in separate arrays. The rounds are combined with weights relative to
    the greatest score of a token in any round.

    Args:
      query: float32 [batch, length, heads, head_dim], length a multiple of chunk_length.
      value: float32, likewise; zeros at padding, which attends only to padding.
      buckets: int32 [batch, heads, rounds, length]; padding has the greatest bucket.
      chunk_length: tokens of a chunk.
      scale: factor of the scores.

    Returns:
      float32 [batch, length, heads, head_dim].
    """
    head_dim = query.shape[-1]
    order = permutations.sorted_order(buckets)  # stable: by position within a bucket
    slots = permutations.inverse(order)  # the place of each position in the order

    # All arrays below are [batch, heads, rounds, ...].
    def in_chunks(x: jax.Array) -> jax.Array:
        """[..., length, ...] -> [..., chunks, chunk_length, ...]."""
        return x.reshape(*x.shape[:3], -1, chunk_length, *x.shape[4:])

    ones = jnp.ones((*value.shape[:3], 1), value.dtype)  # weights @ ones = sum of the weights
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
    """Prepends the previous chunk to each chunk of [..., chunks, chunk_length, ...], axes 3 and 4.

    The first chunk gets the last one, whose tokens are in no P_i of the first. A single chunk is
    returned unchanged.
    """
    return x if x.shape[3] == 1 else jnp.concatenate([jnp.roll(x, 1, axis=3), x], axis=4)


def _penalties(
    buckets: jax.Array, order: jax.Array, slots: jax.Array, chunk_length: int
) -> jax.Array:
    """Computes m_ij, or _NOT_ATTENDED where j is not in the P_i of the round.

    Args:
      buckets: int32 [batch, heads, rounds, length].
      order: int32, likewise; the order of each round.
      slots: int32, likewise; the inverse of order.
      chunk_length: tokens of a chunk.

    Returns:
      float32 [batch, heads, rounds, chunks, chunk_length, keys].
    """
    # Along a round's order neither bucket nor chunk decreases. So j is in P_i if and only if
    # 2 * bucket + chunk of i exceeds that of j by 0 or 1.
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
    """Describes the rotations, drawn once and kept; a call with an rng redraws them."""
    del num_heads, value_dim, kv_length
    check_at_least(1, num_hashes=num_hashes)
    shape = (num_hashes, head_dim, _KEPT_COLUMNS)
    return {"rotations": VariableSpec(shape, _draw_rotations, trained=False)}
