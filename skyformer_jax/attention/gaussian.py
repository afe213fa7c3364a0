"""The Gaussian-kernel primitive (Chen et al., 2021, section 4.1).

Skyformer is built on one operation:

    G(q, k) v:  out_i = sum_j exp(-scale/2 * ||q_i - k_j||^2) v_j

This module has three implementations that agree to rounding: dense, which stores all scores; tiles
in plain JAX; and kernels for accelerators. gaussian_attention chooses one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention.derivatives import with_rules
from skyformer_jax.attention.gaussian_gpu import gpu_gradients, gpu_value
from skyformer_jax.attention.gaussian_tiles import (
    kernel_values,
    only,
    tiled_gradients,
    tiled_tangent,
    tiled_value,
)
from skyformer_jax.attention.gaussian_tpu import tpu_gradients, tpu_value
from skyformer_jax.attention.kernel_inputs import default_precision
from skyformer_jax.attention.platforms import (
    ROWS,
    SCALAR,
    Kernels,
    by_platform,
    check_implementation,
)

# Length of a tile of scores along the longer and the shorter of query and key, by platform. On a
# CPU a tile of this size stays in the caches, as measured (docs/speed.md). Accelerators are fastest
# with few, large tiles; their size only bounds the memory.
_TILE = {"cpu": (1024, 128), "default": (8192, 1024)}

# The kernels by platform.
_ARRAYS = (ROWS, ROWS, ROWS, SCALAR)
_VALUE = Kernels({"cuda": gpu_value, "tpu": tpu_value}, _ARRAYS, ROWS)
_GRADIENTS = Kernels(
    {"cuda": gpu_gradients, "tpu": tpu_gradients}, (*_ARRAYS, ROWS), (ROWS, ROWS, ROWS)
)

# Up to this many scores per head, storing all of them for the gradient is faster than computing
# them twice, on two CPU cores.
_DENSE_SCORES = 128 * 128


def gaussian_scores(query: jax.Array, key: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Computes the Gaussian kernel's values exp(-scale/2 * ||q_i - k_j||^2).

    The product has the highest precision, because the exponent is a difference of larger numbers:
    the exponential would amplify the rounding errors of TF32 or bfloat16 in it.

    Args:
      query: float32 [batch, q_length, heads, head_dim].
      key: float32 [batch, kv_length, heads, head_dim].
      scale: the kernel's inverse squared width.

    Returns:
      float32 [batch, heads, q_length, kv_length], in 0..1.
    """
    products = jnp.einsum("bqhp,bkhp->bhqk", query, key, precision=jax.lax.Precision.HIGHEST)
    query_norms = jnp.einsum("bqhp,bqhp->bhq", query, query)[..., :, None]
    key_norms = jnp.einsum("bkhp,bkhp->bhk", key, key)[..., None, :]
    return kernel_values(0.5 * (query_norms + key_norms) - products, scale)


def gaussian_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: jax.Array | float,
    implementation: str = "auto",
    mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Computes G(query, key) value.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, value_dim]; 0 at masked keys, which is all that a mask of
        keys requires, because the sum is not normalised.
      scale: the kernel's inverse squared width.
      implementation: how the result is computed.

        - "dense": stores all q_length x kv_length scores, also for gradients.
        - "chunked": stores one tile of scores at a time and recomputes it for gradients, so that
          memory is linear in q_length + kv_length for gradients too.
        - "pallas": a kernel for NVIDIA GPUs and TPUs that stores no scores in memory. On a CPU the
          GPU kernel runs in interpret mode, slowly, for testing. It takes no mask and no
          is_causal.
        - "auto": dense for the smallest sizes, where it is faster. Otherwise it depends on the
          platform that the program is compiled for: "pallas" on NVIDIA GPUs and TPUs, else
          "chunked".
      mask: bool [batch or 1, heads or 1, q_length or 1, kv_length], True for the terms of each
        query's sum.
      is_causal: True restricts the sum of query i to keys 0..i.

    Returns:
      float32 [batch, q_length, heads, value_dim], summed in float32. docs/kernels.md documents the
      precision of the products.

    Raises:
      ValueError: if the implementation is unknown or does not support the mask or is_causal.
    """
    check_implementation(implementation)
    masked = mask is not None or is_causal
    if implementation == "pallas" and masked:
        raise ValueError(
            'implementation="pallas" can only mask whole keys; choose "auto", "chunked" or "dense" '
            "for a mask of queries and keys, or for is_causal"
        )
    few = query.shape[1] * key.shape[1] <= _DENSE_SCORES
    if (
        implementation == "dense"
        or (implementation == "auto" and few)
        or 0 in (*query.shape, *key.shape)
    ):
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        scores = only(mask, gaussian_scores(query, key, scale))
        if is_causal:
            earlier = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
            scores = only(earlier[None, None], scores)
        return jnp.einsum("bhqk,bkhp->bqhp", scores, value)
    # Gradients are traced after the call, but must use the settings in effect during the call.
    function = _without_scores(
        "chunked" if masked else implementation,
        mask is not None,
        is_causal,
        default_precision(),
        tuple(_TILE.items()),
    )
    arrays = (query, key, value, jnp.asarray(scale, jnp.float32))
    return function(*arrays) if mask is None else function(*arrays, mask)


@functools.cache
def _without_scores(
    implementation: str,
    has_mask: bool,
    is_causal: bool,
    precision: str | None,
    tiles: tuple[tuple[str, tuple[int, int]], ...],
) -> Callable[..., jax.Array]:
    """Returns the primitive as a function of query, key, value, scale and an optional mask.

    It does not store all scores. Tangents and higher-order derivatives always use the tiled
    functions, not the kernels.

    Args:
      implementation: "auto", "chunked" or "pallas".
      has_mask: whether the function takes a mask.
      is_causal: as in gaussian_attention.
      precision: the precision of products, a value of jax.default_matmul_precision.
      tiles: items of _TILE.
    """

    def chunked(tiled: Callable[..., Any], *arrays: jax.Array, tile: tuple[int, int]) -> Any:
        more = arrays[4:] if has_mask else (None, *arrays[4:])
        return tiled(*arrays[:4], *more, tile=tile, is_causal=is_causal)

    value, tangent, gradients, plain = (
        functools.partial(by_platform, functools.partial(chunked, tiled), precision, tiles)
        for tiled in (
            tiled_value,
            tiled_tangent,
            tiled_gradients,
            functools.partial(tiled_gradients, skips=False),
        )
    )

    def all_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return _with_scale(gradients(*arrays), *arrays)

    def plain_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return _with_scale(plain(*arrays), *arrays)

    if implementation == "chunked":
        return with_rules(value, tangent, all_gradients, plain_gradients)
    interpreted = implementation == "pallas"

    def by_kernel(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        found = gradients(*arrays, kernels=_GRADIENTS, interpreted=interpreted)
        return _with_scale(found, *arrays)

    value_by_kernel = functools.partial(value, kernels=_VALUE, interpreted=interpreted)
    return with_rules(value_by_kernel, tangent, by_kernel, plain_gradients)


def _with_scale(
    gradients: tuple[jax.Array, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    *others: jax.Array,
) -> tuple[jax.Array, ...]:
    """Adds the gradient for scale to those for query, key and value; casts each to its dtype.

    G depends only on sqrt(scale) q and sqrt(scale) k, and does not change if both are translated.
    """
    del others
    d_query, d_key, _ = gradients
    q, k = (x.astype(jnp.float32) for x in (query, key))
    centre = k.mean(axis=1, keepdims=True)
    d_scale = ((q - centre) * d_query).sum() + ((k - centre) * d_key).sum()
    arrays = (query, key, value, scale)
    all_gradients = (*gradients, d_scale / (2 * scale))
    return tuple(g.astype(x.dtype) for g, x in zip(all_gradients, arrays, strict=True))
