"""BigBird (Zaheer et al., 2020): softmax attention to global, neighbouring and random blocks.

The sequence is split into blocks of b tokens (section 3 and appendix D of the paper, the internal
transformer construction, ITC, whose global tokens are tokens of the sequence). A query of block i
attends to the keys of

    g global blocks, the blocks within w // 2 of i (window), r random other blocks,

and the queries of the global blocks attend to all keys. The paper does not fix which tokens are
global (section 2 takes any subset of g; figure 1 draws the first ones). The default here is the
first g blocks, where a summary token would be. The code published by its authors and by Hugging
Face uses the first and the last block: global_blocks="first_last".
"""

import jax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.inputs import (
    check_at_least,
    fixed_key,
    hide_masked,
)
from skyformer_jax.attention.softmax import softmax_attention
from skyformer_jax.attention.variables import VariableSpec

GLOBAL_BLOCKS = ("first", "first_last")

_HIDDEN = -1e30  # added to the scores of keys that do not count


def attended_blocks(
    rng: jax.Array,
    num_blocks: int,
    num_first: int,
    num_window: int,
    num_random: int,
    num_last: int = 0,
) -> tuple[jax.Array, np.ndarray]:
    """Returns the key blocks of each query block, without repetitions among the valid ones.

    Args:
      rng: a jax.random key for the random blocks, which are drawn uniformly without replacement
        among those that are neither global nor in the window.
      num_blocks: blocks of the sequence.
      num_first: global blocks at its beginning.
      num_window: w, odd.
      num_random: r of each query block.
      num_last: global blocks at its end; g = num_first + num_last is at most num_blocks.

    Returns:
      blocks int32 [num_blocks, g + w + r] and valid bool of that shape: False where there is no
      such block, or where a block of the window is also global.
    """
    rows = np.arange(num_blocks, dtype=np.int32)[:, None]
    end = num_blocks - num_last
    of_row = np.concatenate([rows[:num_first, 0], rows[end:, 0]])
    global_blocks = np.broadcast_to(of_row, (num_blocks, num_first + num_last))
    window = rows + np.arange(num_window, dtype=np.int32) - num_window // 2
    window_valid = (window >= num_first) & (window < end)

    # Floyd's algorithm: r distinct ranks among the `others` blocks that remain for each row.
    in_window = window_valid.sum(axis=1, dtype=np.int32)
    others = end - num_first - in_window
    columns: list[jax.Array] = []
    for i, key in enumerate(jax.random.split(rng, num_random) if num_random else ()):
        last = others - num_random + i  # negative where fewer than r remain: all are used
        drawn = jax.random.randint(key, (num_blocks,), 0, np.maximum(last, 0) + 1, jnp.int32)
        taken = (
            jnp.any(jnp.stack([drawn == rank for rank in columns]), axis=0) if columns else False
        )
        rank = jnp.where(taken, last, drawn)
        columns.append(jnp.where(others <= num_random, i, rank))
    ranks = jnp.stack(columns, axis=1) if columns else jnp.zeros((num_blocks, 0), jnp.int32)
    random_valid = np.arange(num_random) < others[:, None]
    # Ranks count from the first block that is not global, and skip the window.
    start = np.clip(rows - num_window // 2, num_first, end)
    blocks = ranks + num_first
    blocks = jnp.where(blocks >= start, blocks + in_window[:, None], blocks)

    blocks = jnp.concatenate([global_blocks, window, blocks], axis=1)
    valid = np.concatenate([np.ones_like(global_blocks, bool), window_valid, random_valid], axis=1)
    return jnp.clip(blocks, 0, num_blocks - 1).astype(jnp.int32), valid


@attention_function(self_attention_only=True)
def bigbird_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    block_size: int = 64,
    num_global_blocks: int = 2,
    num_window_blocks: int = 3,
    num_random_blocks: int = 3,
    global_blocks: str = "first",
    pattern: jax.Array | None = None,
) -> jax.Array:
    """BigBird self-attention, computed in blocks, linear in the length.

    If the blocks of every query cover the sequence, it equals softmax_attention. The last block may
    be shorter. All examples of a batch and all heads share the random blocks, which depend on the
    padded length.

    Args:
      query: [batch, length, heads, head_dim], unscaled.
      key: [batch, length, heads, head_dim].
      value: [batch, length, heads, head_dim].
      mask: bool [batch, length], True at real tokens; any pattern.
      rng: a jax.random key to draw the random blocks with; None means `pattern`.
      scale: factor of the scores; None means head_dim**-0.5.
      block_size: b, the number of tokens of a block.
      num_global_blocks: g, the number of global blocks of the sequence.
      num_window_blocks: w, odd: the query's own block and w // 2 blocks on each side.
      num_random_blocks: r, the number of random blocks of each query block.
      global_blocks: which blocks are global: "first" for the first g, or "first_last" for the first
        g - g // 2 and the last g // 2, as in the published code and in Hugging Face's (g = 2: one
        each).
      pattern: uint32 [2], the data of a key that fixes the random blocks if rng is None; None means
        a fixed key.

    Returns:
      [batch, length, heads, head_dim] in the dtype of value; zeros for an example without any
      real key, and for a query whose blocks contain no real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or an option is out of range.
    """
    check_at_least(1, block_size=block_size, num_window_blocks=num_window_blocks)
    check_at_least(0, num_global_blocks=num_global_blocks, num_random_blocks=num_random_blocks)
    if global_blocks not in GLOBAL_BLOCKS:
        raise ValueError(
            f"global_blocks must be one of {', '.join(GLOBAL_BLOCKS)}; got {global_blocks!r}"
        )
    if num_window_blocks % 2 == 0:
        raise ValueError(f"num_window_blocks must be odd; got {num_window_blocks}")
    key, value = hide_masked(key, value, mask)
    if rng is None:
        # Two words are the data of a Threefry key, whatever jax_default_prng_impl is.
        kept = None if pattern is None else jax.random.wrap_key_data(pattern, impl="threefry2x32")
        rng = fixed_key() if kept is None else kept

    batch, length = query.shape[:2]
    block_size = min(block_size, length)
    num_blocks = -(-length // block_size)
    num_global = min(num_global_blocks, num_blocks)
    num_last = num_global // 2 if global_blocks == "first_last" else 0
    num_first = num_global - num_last
    # Queries before `start` and from `end` on are in global blocks, and attend to all keys.
    start = min(num_first * block_size, length)
    end = min((num_blocks - num_last) * block_size, length)
    outputs = []
    if num_global:
        globals_ = jnp.concatenate([query[:, :start], query[:, end:]], axis=1)
        everywhere = softmax_attention(globals_, key, value, mask=mask, scale=scale)
        outputs = [everywhere[:, :start], everywhere[:, start:]]
    if num_blocks > num_global:
        blocks, valid = attended_blocks(
            rng, num_blocks, num_first, num_window_blocks, num_random_blocks, num_last
        )
        real = jnp.ones((batch, length), bool) if mask is None else mask
        own = slice(num_first, num_blocks - num_last)
        some = _attend_to_blocks(
            query, key, value, real, blocks[own], valid[own], own, block_size, scale
        )
        outputs.insert(1, some[:, : end - start].astype(value.dtype))
    return jnp.concatenate(outputs, axis=1)


def _attend_to_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    blocks: jax.Array,
    valid: np.ndarray,
    own: slice,
    block_size: int,
    scale: jax.Array | float | None,
) -> jax.Array:
    """Computes softmax attention of some query blocks, each to its own key blocks.

    Each head's blocks are gathered separately, as whole blocks, and the sum of the weights is a
    product with a column of ones. XLA then needs the fewest changes of array layout, on CPUs as
    well as TPUs.

    Args:
      query: [batch, length, heads, head_dim].
      key: likewise; 0 at padding.
      value: likewise.
      real: bool [batch, length], False at padding.
      blocks: int [query blocks, k], the key blocks of each query block.
      valid: bool, likewise; False where a block does not count.
      own: the query blocks to compute.
      block_size: tokens of a block; the last may be shorter.
      scale: factor of the scores; None means head_dim**-0.5.

    Returns:
      float32 [batch, query blocks * block_size, heads, head_dim]; zeros for a query without a real
      key.
    """

    def in_blocks(x: jax.Array) -> jax.Array:
        """[batch, length, heads, c] -> [batch, heads, blocks, block_size, c]."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_size), (0, 0), (0, 0)))
        x = x.reshape(x.shape[0], -1, block_size, *x.shape[2:])
        return jnp.moveaxis(x, 3, 1)

    def gathered(x: jax.Array) -> jax.Array:
        """[batch, heads, query blocks, keys of their blocks, c]."""
        found = in_blocks(x)[:, :, blocks]
        return found.reshape(*found.shape[:3], -1, x.shape[-1])

    here = gathered(real[:, :, None, None])[..., 0]
    here &= np.repeat(valid, block_size, axis=1)[None, None]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = in_blocks(query)[:, :, own].astype(jnp.float32) * scale
    scores = jnp.einsum("bhqip,bhqjp->bhqij", rows, gathered(key).astype(jnp.float32))
    scores += jnp.where(here, 0.0, _HIDDEN)[..., None, :]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    values = gathered(value).astype(jnp.float32)
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    out = jnp.einsum("bhqij,bhqjp->bhqip", weights, values)
    out = jnp.where(here.any(axis=-1)[..., None, None], out[..., :-1] / out[..., -1:], 0)
    out = jnp.moveaxis(out, 1, 3)
    return out.reshape(out.shape[0], -1, *out.shape[3:])


def bigbird_variables(
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    kv_length: int | None,
) -> dict[str, VariableSpec]:
    """Describes the key data of the random blocks, drawn once and kept, separately per layer."""
    del num_heads, head_dim, value_dim, kv_length

    def init(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.bits(rng, shape, jnp.uint32)

    return {"pattern": VariableSpec((2,), init, trained=False)}
