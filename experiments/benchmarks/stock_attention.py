"""Softmax attention with JAX's own TPU kernel, splash attention, to compare with ours.

Of JAX's kernels it takes the fewest cycles by tpu_schedule. It runs with one backward kernel for
all gradients and with the largest blocks that were tried.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from skyformer_jax.attention import REGISTRY, softmax_attention

_QUERIES, _KEYS, _COMPUTED = 1024, 2048, 512


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: Any = None,
    scale: float | None = None,
    **options: Any,
) -> jax.Array:
    """Computes softmax_attention with splash attention, for lengths that the blocks divide.

    It supports no restriction except the mask; other options are ignored. Keys shorter than a
    block, as in the short example that initialises a model, go to softmax_attention instead.
    """
    del rng, options
    if key.shape[1] < _COMPUTED:
        return softmax_attention(query, key, value, mask=mask, scale=scale)
    batch, length, heads, head_dim = query.shape
    sizes = splash.BlockSizes(
        block_q=min(_QUERIES, length),
        block_kv=min(_KEYS, key.shape[1]),
        block_kv_compute=min(_COMPUTED, key.shape[1]),
        block_q_dkv=min(_QUERIES, length),
        block_kv_dkv=min(_KEYS, key.shape[1]),
        block_kv_dkv_compute=min(_COMPUTED, key.shape[1]),
        use_fused_bwd_kernel=True,
    )
    full = masks.MultiHeadMask([masks.FullMask((length, key.shape[1]))] * heads)
    kernel = splash.make_splash_mha(full, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    query = query * (head_dim**-0.5 if scale is None else scale)
    real = jnp.ones((batch, key.shape[2]), bool) if mask is None else mask
    segments = splash.SegmentIds(jnp.ones((batch, length), jnp.int32), real.astype(jnp.int32))
    return jnp.swapaxes(jax.vmap(kernel)(query, key, value, segments), 1, 2)


@contextlib.contextmanager
def stock_softmax() -> Iterator[None]:
    """Makes softmax attention layers that are traced within the block call splash attention."""
    entry = REGISTRY["softmax"]
    REGISTRY["softmax"] = entry._replace(function=splash_attention)  # type: ignore[index]
    try:
        yield
    finally:
        REGISTRY["softmax"] = entry  # type: ignore[index]
