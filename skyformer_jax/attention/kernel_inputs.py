"""What the kernels for all accelerators do with their arrays first."""

import math

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import zeros_like

LOG2E = math.log2(math.e)
# What jax.default_matmul_precision sets, and its values under which a product takes one pass.
_PRECISION = "jax_default_matmul_precision"
_ONE_PASS = (None, "default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32")


def takes_one_pass() -> bool:
    """Whether products of float32 numbers may be as fast as jax.default_matmul_precision allows."""
    return getattr(jax.config, _PRECISION) in _ONE_PASS


def mean_of_keys(key: jax.Array) -> jax.Array:
    """float32 [batch, 1, heads, head_dim]: of the keys that are not zero, as masked ones are."""
    key = key.astype(jnp.float32)
    real = (key != 0).any(axis=-1, keepdims=True)
    count = real.sum(axis=1, keepdims=True, dtype=jnp.float32)
    return key.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)


def varying_alike(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, as varying over the same axes of a jax.shard_map that checks what varies."""
    if len({jax.typeof(x).manual_axis_type for x in arrays}) == 1:
        return arrays
    zero = jnp.stack([zeros_like(x[(0,) * x.ndim], jnp.float32) for x in arrays]).sum()
    return [x + zero.astype(x.dtype) for x in arrays]
