"""Preparation of arrays and precision settings, common to the kernels for all accelerators."""

import math

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import zeros_like

LOG2E = math.log2(math.e)
# Values of jax.default_matmul_precision with which a product takes one pass.
_ONE_PASS = (None, "default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32")


def default_precision() -> str | None:
    """Returns the current setting of jax.default_matmul_precision."""
    return getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009


def takes_one_pass() -> bool:
    """Returns whether float32 products should have the default precision, which takes one pass."""
    return default_precision() in _ONE_PASS


def mean_of_keys(key: jax.Array) -> jax.Array:
    """Returns the mean of the nonzero keys, float32 [batch, 1, heads, head_dim].

    Masked keys are zero, so they do not count.
    """
    key = key.astype(jnp.float32)
    real = (key != 0).any(axis=-1, keepdims=True)
    count = real.sum(axis=1, keepdims=True, dtype=jnp.float32)
    return key.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)


def varying_alike(arrays: list[jax.Array]) -> list[jax.Array]:
    """Makes arrays vary over the same axes, for a jax.shard_map that checks varying axes."""
    if len({jax.typeof(x).manual_axis_type for x in arrays}) == 1:
        return arrays
    zero = jnp.stack([zeros_like(x[(0,) * x.ndim], jnp.float32) for x in arrays]).sum()
    return [x + zero.astype(x.dtype) for x in arrays]
