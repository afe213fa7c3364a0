"""Hashed n-grams of tokens, whose embeddings a model may add to those of the tokens."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards

# Odd, so that the product is a permutation of the 32-bit integers: 2^32 divided by the golden ratio
# (Knuth, The Art of Computer Programming, volume 3, section 6.4).
_MULTIPLIER = 0x9E3779B1


def hashed_ngrams(
    tokens: jax.Array, n: int, num_rows: int, *, axis_name: str | None = None
) -> jax.Array:
    """Hashes the n tokens that end at each position to a row of a table.

    A model that adds such rows to its embeddings sees words without composing them of letters
    (Pagnoni et al., 2024, Byte Latent Transformer, section 3.2.1, with another hash function). It
    sees no later token. Different n-grams may have the same row.

    Args:
      tokens: int [batch, length]. Tokens before the first position count as 0.
      n: the number of tokens of an n-gram.
      num_rows: the number of rows of the table.
      axis_name: the mesh axis over which the length is split, or None. The last n - 1 tokens of
        each part then go to the next device.

    Returns:
      int32 [batch, length], rows in 0 to num_rows - 1.

    Raises:
      ValueError: if a part of a split sequence has fewer than n - 1 tokens.
    """
    length = tokens.shape[1]
    extended = shards.with_halo(tokens.astype(jnp.uint32)[:, :, None], n - 1, axis_name)[:, :, 0]
    hashed = jnp.zeros(tokens.shape, jnp.uint32)
    for first in range(n):
        mixed = (hashed ^ extended[:, first : first + length]) * jnp.uint32(_MULTIPLIER)
        hashed = mixed ^ (mixed >> 15)
    return (hashed % jnp.uint32(num_rows)).astype(jnp.int32)
