"""BigBird (Zaheer et al., 2020): softmax attention to global, neighbouring and random blocks.

The sequence is cut into blocks of b tokens (section 3 and appendix D of the paper, the
construction from internal tokens, ITC). A query of block i attends to the keys of

    the first g blocks (global), the blocks within w // 2 of i (window), r random other blocks,

and the queries of the global blocks attend to all keys.
"""

import jax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention.inputs import (
    check_and_hide_masked,
    check_at_least,
    check_self_attention,
    fixed_key,
    reshaped,
    zeros_like,
)
from skyformer_jax.attention.softmax import softmax_attention
from skyformer_jax.attention.variables import VariableSpec


def attended_blocks(
    rng: jax.Array, num_blocks: int, num_global: int, num_window: int, num_random: int
) -> tuple[jax.Array, np.ndarray]:
    """The key blocks of each query block, none of them twice.

    Args:
      rng: a jax.random key, for the random ones: uniform without replacement among those that
        are neither global nor in the window.
      num_blocks: blocks of the sequence.
      num_global: g, at most num_blocks.
      num_window: w, odd.
      num_random: r of each query block.

    Returns:
      blocks int32 [num_blocks, g + w + r] and valid bool of that shape: False where there is no
      such block, or where it is global and in the window at once.
    """
    rows = np.arange(num_blocks)[:, None]
    global_blocks = np.broadcast_to(np.arange(num_global), (num_blocks, num_global))
    window = rows + np.arange(num_window) - num_window // 2
    window_valid = (window >= num_global) & (window < num_blocks)

    # Floyd's algorithm: r distinct ranks among the `others` blocks that are left to each row.
    others = num_blocks - num_global - window_valid.sum(axis=1)
    columns: list[jax.Array] = []
    for i, key in enumerate(jax.random.split(rng, num_random) if num_random else ()):
        last = others - num_random + i  # negative where fewer than r are left: all are taken
        drawn = jax.random.randint(key, (num_blocks,), 0, np.maximum(last, 0) + 1, jnp.int32)
        taken = (
            jnp.any(jnp.stack([drawn == rank for rank in columns]), axis=0) if columns else False
        )
        rank = jnp.where(taken, last, drawn)
        columns.append(jnp.where(others <= num_random, i, rank))
    ranks = jnp.stack(columns, axis=1) if columns else jnp.zeros((num_blocks, 0), jnp.int32)
    random_valid = np.arange(num_random) < others[:, None]
    # Ranks count from the first block that is not global, and step over the window.
    start = np.clip(rows - num_window // 2, num_global, num_blocks)
    blocks = ranks + num_global
    blocks = jnp.where(blocks >= start, blocks + window_valid.sum(axis=1)[:, None], blocks)

    blocks = jnp.concatenate([global_blocks, window, blocks], axis=1)
    valid = np.concatenate([np.ones_like(global_blocks, bool), window_valid, random_valid], axis=1)
    return jnp.clip(blocks, 0, num_blocks - 1).astype(jnp.int32), valid


def bigbird_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: float | None = None,
    block_size: int = 64,
    num_global_blocks: int = 2,
    num_window_blocks: int = 3,
    num_random_blocks: int = 3,
    pattern: jax.Array | None = None,
) -> jax.Array:
    """BigBird self-attention, computed in blocks, linear in the length.

    Where the blocks of every query cover the sequence it is softmax_attention. The last block may
    be shorter; all examples of a batch, and all heads, share the random blocks, which depend on
    the padded length.

    Args:
      query: [batch, length, heads, head_dim], unscaled.
      key: [batch, length, heads, head_dim].
      value: [batch, length, heads, head_dim].
      mask: bool [batch, length], True at real tokens; any pattern.
      rng: a jax.random key to draw the random blocks by; None takes `pattern`.
      scale: factor of the scores; None means head_dim**-0.5.
      block_size: b tokens.
      num_global_blocks: g, the first of the sequence.
      num_window_blocks: w, odd: the query's own block and as many on both sides.
      num_random_blocks: r of each query block.
      pattern: uint32 [2], the data of a key that fixes the random blocks where rng is None; None
        takes a fixed key.

    Returns:
      [batch, length, heads, head_dim] in the dtype of value; zeros for an example without any
      real key, and for a query none of whose blocks has one.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or an option is out of range.
    """
    check_at_least(1, block_size=block_size, num_window_blocks=num_window_blocks)
    check_at_least(0, num_global_blocks=num_global_blocks, num_random_blocks=num_random_blocks)
    if num_window_blocks % 2 == 0:
        raise ValueError(f"num_window_blocks must be odd; got {num_window_blocks}")
    key, value = check_and_hide_masked(query, key, value, mask)
    check_self_attention("bigbird", query, key)
    if rng is None:
        rng = fixed_key() if pattern is None else jax.random.wrap_key_data(pattern)

    batch, length = query.shape[:2]
    block_size = min(block_size, length)
    num_blocks = -(-length // block_size)
    num_global = min(num_global_blocks, num_blocks)
    global_length = min(num_global * block_size, length)
    outputs = []
    if global_length:
        everywhere = softmax_attention(query[:, :global_length], key, value, mask=mask, scale=scale)
        outputs.append(everywhere)
    if num_blocks > num_global:
        blocks, valid = (
            x[num_global:]
            for x in attended_blocks(
                rng, num_blocks, num_global, num_window_blocks, num_random_blocks
            )
        )
        real = jnp.ones((batch, length), bool) if mask is None else mask

        def in_blocks(x: jax.Array) -> jax.Array:
            padding = [(0, 0)] * x.ndim
            padding[1] = (0, num_blocks * block_size - length)
            return jnp.pad(x, padding).reshape(batch, num_blocks, block_size, *x.shape[2:])

        def gathered(x: jax.Array) -> jax.Array:
            """[batch * query blocks, keys of those blocks, ...]."""
            found = in_blocks(x)[:, blocks]
            return _merged(found.reshape(batch, len(blocks), -1, *x.shape[2:]))

        in_every_example = (
            zeros_like(real[:, :1, None]) | jnp.repeat(valid, block_size, axis=1)[None]
        )
        some = softmax_attention(
            _merged(in_blocks(query)[:, num_global:]),
            gathered(key),
            gathered(value),
            mask=gathered(real) & _merged(in_every_example),
            scale=scale,
        )
        some = _split(some, batch).reshape(batch, -1, *query.shape[2:])
        outputs.append(some[:, : length - global_length])
    return jnp.concatenate(outputs, axis=1)


def _merged(x: jax.Array) -> jax.Array:
    """[batch, blocks, ...] -> [batch * blocks, ...], sharded as the batch is."""
    return reshaped(x, (x.shape[0] * x.shape[1], *x.shape[2:]), lambda spec: (spec[0], *spec[2:]))


def _split(x: jax.Array, batch: int) -> jax.Array:
    """[batch * blocks, ...] -> [batch, blocks, ...], sharded as the first axis was."""
    shape = (batch, x.shape[0] // batch, *x.shape[1:])
    return reshaped(x, shape, lambda spec: (spec[0], None, *spec[1:]))


def bigbird_variables(
    *, num_heads: int, head_dim: int, kv_length: int | None
) -> dict[str, VariableSpec]:
    """The key of the random blocks, drawn once and kept, so that each layer has its own."""
    del num_heads, head_dim, kv_length

    def init(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.bits(rng, shape, jnp.uint32)

    return {"pattern": VariableSpec((2,), init, trained=False)}
