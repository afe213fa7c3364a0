"""Layer normalization, with sums that are also fast on CPUs."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from skyformer_jax.attention.common import on_automatic_axes, spec_of
from skyformer_jax.attention.derivatives import with_rules
from skyformer_jax.attention.sums import product_last, product_rows

EPSILON = 1e-5  # as in the published code


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, with the parameters of flax.linen.LayerNorm.

    Attributes:
      dtype: dtype of the result; the statistics and the parameters are float32.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., width] to mean 0 and variance 1, then applies scale and bias."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        normed = on_automatic_axes(
            layer_norm, spec_of(x), x.astype(jnp.float32), *nn.unbox((scale, bias))
        )
        return normed.astype(self.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes (x - mean) / sqrt(variance + EPSILON) * scale + bias over the last axis.

    On CPUs, XLA's sums take several times as long as products with a vector of ones. This function
    and its custom gradient rule therefore use such products on CPUs, and sums elsewhere.

    Args:
      x: float32 [..., width].
      scale: float32 [width].
      bias: float32 [width].

    Returns:
      float32 [..., width].
    """
    row = (*[1] * (x.ndim - 1), x.shape[-1])
    scale, bias = scale.reshape(row), bias.reshape(row)
    return jax.lax.platform_dependent(x, scale, bias, cpu=_by_products, default=_by_sums)


def _by_sums(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0)
    return (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias


def _value(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    normed, _ = _normed(x)
    return normed * scale + bias


def _tangent(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    d_x: jax.Array,
    d_scale: jax.Array,
    d_bias: jax.Array,
) -> jax.Array:
    del bias
    normed, root = _normed(x)
    return root * _across(normed, d_x) * scale + normed * d_scale + d_bias


def _gradients(
    x: jax.Array, scale: jax.Array, bias: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del bias
    normed, root = _normed(x)
    d_x = root * _across(normed, d_out * scale)
    return d_x, _sum_of_rows(normed * d_out), _sum_of_rows(d_out)


_by_products = with_rules(_value, _tangent, _gradients)


def _normed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns normalized x, and the reciprocal of its standard deviation."""
    centred = x - _mean(x)
    root = jax.lax.rsqrt(_mean(centred * centred) + EPSILON)
    return centred * root, root


def _across(normed: jax.Array, moved: jax.Array) -> jax.Array:
    """Subtracts the parts of moved that mean and variance absorb; symmetric, linear in moved."""
    return moved - _mean(moved) - normed * _mean(normed * moved)


def _mean(x: jax.Array) -> jax.Array:
    """Means over the last axis, [..., 1]."""
    return product_last(x) / x.shape[-1]


def _sum_of_rows(x: jax.Array) -> jax.Array:
    """Sums [..., width] to [1, ..., width], the shape of scale and bias."""
    total = product_rows(x.reshape(-1, x.shape[-1]))
    return total.reshape((*[1] * (x.ndim - 1), x.shape[-1]))
