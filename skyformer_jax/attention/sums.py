"""Sums along an axis as products with ones, which XLA computes several times faster on CPUs."""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def sum_last(x: jax.Array) -> jax.Array:
    """Computes x.sum(axis=-1, keepdims=True), as a product on CPUs and as a sum elsewhere."""
    return jax.lax.platform_dependent(x, cpu=product_last, default=_sum_last)


def sum_rows(x: jax.Array) -> jax.Array:
    """Computes x.sum(axis=-2, keepdims=True), as a product on CPUs and as a sum elsewhere."""
    return jax.lax.platform_dependent(x, cpu=product_rows, default=_sum_rows)


def product_last(x: jax.Array) -> jax.Array:
    """Computes sum_last as a product with ones."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision=_HIGHEST)


def product_rows(x: jax.Array) -> jax.Array:
    """Computes sum_rows as a product with ones."""
    return jnp.matmul(jnp.ones((1, x.shape[-2]), x.dtype), x, precision=_HIGHEST)


def _sum_last(x: jax.Array) -> jax.Array:
    return x.sum(axis=-1)[..., None]


def _sum_rows(x: jax.Array) -> jax.Array:
    return x.sum(axis=-2)[..., None, :]
