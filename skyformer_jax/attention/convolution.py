"""A depthwise convolution of the values over the sequence, which some attentions add."""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.variables import VariableSpec


def convolve_values(
    value: jax.Array,
    kernel: jax.Array,
    axis_name: str | None,
    *,
    segment_ids: jax.Array | None = None,
    is_causal: bool = False,
    before: jax.Array | None = None,
) -> jax.Array:
    """Computes a depthwise convolution over the length, with zeros beyond the ends.

    out_i = sum_s kernel_s v_(i + s - size // 2), for each head (Xiong et al., 2021, figure 2) or
    for each feature of each head. If is_causal, out_i = sum_s kernel_s v_(i + s - (size - 1)).

    It is computed as a sum of shifted values, which XLA fuses. On CPUs this takes a twentieth
    (size 5) to half (size 35) of the time of XLA's grouped convolution.

    Args:
      value: [batch, length, heads, head_dim], 0 at padding.
      kernel: [size, heads] or [size, heads, head_dim], size odd.
      axis_name: mesh axis over which the length is split, or None. The values at the ends of each
        part then cross devices.
      segment_ids: int [batch, length]; values of other segments count as 0.
      is_causal: True excludes values after the position itself.
      before: [batch, size - 1, heads, head_dim], the values before the first position of a causal
        convolution; None means zeros.

    Returns:
      [batch, length, heads, head_dim].

    Raises:
      ValueError: if the kernel has another shape.
    """
    _, length, heads, head_dim = value.shape
    size = len(kernel)
    if kernel.ndim == 2:
        kernel = kernel[:, :, None]
    if kernel.ndim != 3 or size % 2 == 0 or kernel.shape[1:] not in _shapes(value):
        raise ValueError(
            f"conv_kernel must be [odd size, heads = {heads}] or [odd size, {heads}, "
            f"head_dim = {head_dim}]; got {kernel.shape}"
        )
    reach = size - 1 if is_causal else size // 2

    def extended(x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [batch, reach + length + reach, features]."""
        flat = x.reshape(*x.shape[:2], -1)
        return shards.with_halo(flat, reach, axis_name)

    features = extended(value)
    if before is not None:
        features = features.at[:, :reach].set(before.reshape(len(value), reach, -1))
    segments = None if segment_ids is None else extended(segment_ids)
    weights = jnp.broadcast_to(kernel, (size, heads, head_dim)).reshape(size, -1)
    out = jnp.zeros_like(features[:, :length])
    for i, row in enumerate(weights):
        term = features[:, i : i + length] * row[None, None]
        if segments is not None:
            same = segments[:, i : i + length] == segments[:, reach : reach + length]
            term = jnp.where(same, term, 0)
        out += term
    return out.reshape(value.shape)


def _shapes(value: jax.Array) -> tuple[tuple[int, int], ...]:
    heads, head_dim = value.shape[2:]
    return (heads, 1), (heads, head_dim)


def conv_kernel_spec(conv_size: int, *heads: int) -> dict[str, VariableSpec]:
    """Describes the kernel [conv_size, *heads] that a layer keeps; {} if conv_size is 0.

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
