"""A depthwise convolution of the values over the sequence, which some attentions add."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.variables import VariableSpec


def convolve_values(value: jax.Array, kernel: jax.Array, axis_name: str | None) -> jax.Array:
    """Depthwise convolution over the length, with zeros beyond the ends.

    out_i = sum_s kernel_s v_(i + s - size // 2), for each head (Xiong et al., 2021, figure 2) or
    for each of its features.

    It is computed as a sum of shifted values, which XLA fuses. On CPUs that takes a twentieth
    (size 5) to half (size 35) of the time of XLA's grouped convolution.

    Args:
      value: [batch, length, heads, head_dim], 0 at padding.
      kernel: [size, heads] or [size, heads, head_dim], size odd.
      axis_name: mesh axis over which the length is split; the values at the ends of each part then
        cross devices.

    Returns:
      [batch, length, heads, head_dim].

    Raises:
      ValueError: if the shape of the kernel is another.
    """
    _, length, heads, head_dim = value.shape
    if kernel.ndim == 2:
        kernel = kernel[:, :, None]
    if kernel.ndim != 3 or len(kernel) % 2 == 0 or kernel.shape[1:] not in _shapes(value):
        raise ValueError(
            f"conv_kernel must be [odd size, heads = {heads}] or [odd size, {heads}, "
            f"head_dim = {head_dim}]; got {kernel.shape}"
        )
    features = shards.with_halo(value.reshape(*value.shape[:2], -1), len(kernel) // 2, axis_name)
    weights = jnp.broadcast_to(kernel, (len(kernel), heads, head_dim)).reshape(len(kernel), -1)
    out = sum(features[:, i : i + length] * row[None, None] for i, row in enumerate(weights))
    return out.reshape(value.shape)


def _shapes(value: jax.Array) -> tuple[tuple[int, int], ...]:
    heads, head_dim = value.shape[2:]
    return (heads, 1), (heads, head_dim)


def conv_kernel_spec(conv_size: int, *heads: int) -> dict[str, VariableSpec]:
    """The kernel [conv_size, *heads] that a layer keeps; none where conv_size is 0.

    It starts as Lecun-normal noise, as in the published code of Nystromformer up to a constant.

    Raises:
      ValueError: if conv_size is even or negative.
    """
    if conv_size == 0:
        return {}
    if conv_size < 0 or conv_size % 2 == 0:
        raise ValueError(f"conv_size must be odd, or 0 for no convolution; got {conv_size}")
    init = jax.nn.initializers.normal(conv_size**-0.5, jnp.float32)
    return {"conv_kernel": VariableSpec((conv_size, *heads), init, trained=True)}
