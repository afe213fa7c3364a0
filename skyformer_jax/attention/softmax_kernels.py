"""Softmax attention's kernels by platform, with the signatures of softmax_tiles.

A kernel takes key and value with as many heads as query, and masks whole keys. This module converts
the arguments of the tiled functions to those of a kernel.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import softmax_gpu, softmax_tpu
from skyformer_jax.attention.common import repeat_heads


def _value(
    kernel: Callable[..., Any],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Computes tiled_value by a kernel, for a mask [batch or 1, 1, 1, kv_length]."""
    key, value = (repeat_heads(x, query.shape[2]) for x in (key, value))
    return kernel(query, key, value, scale, _of_keys(mask, key), **options)


def _gradients(
    kernel: Callable[..., Any],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    *others: jax.Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes tiled_gradients by a kernel, likewise."""
    kv_heads = key.shape[2]
    key, value = (repeat_heads(x, query.shape[2]) for x in (key, value))
    d_query, *found = kernel(query, key, value, scale, _of_keys(mask, key), *others, **options)

    def of_shared(x: jax.Array) -> jax.Array:
        if x.shape[2] == kv_heads:
            return x
        return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).sum(axis=3)

    d_key, d_value = map(of_shared, found)
    return d_query, d_key, d_value


def _of_keys(mask: jax.Array | None, key: jax.Array) -> jax.Array | None:
    """[batch or 1, 1, 1, kv_length] -> [batch, kv_length]."""
    return None if mask is None else jnp.broadcast_to(mask[:, 0, 0], key.shape[:2])


VALUE: Mapping[str, Callable[..., Any]] = {
    "cuda": functools.partial(_value, softmax_gpu.gpu_value),
    "tpu": functools.partial(_value, softmax_tpu.tpu_value),
}
GRADIENTS: Mapping[str, Callable[..., Any]] = {
    "cuda": functools.partial(_gradients, softmax_gpu.gpu_gradients),
    "tpu": functools.partial(_gradients, softmax_tpu.tpu_gradients),
}
