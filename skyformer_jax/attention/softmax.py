"""Softmax attention, the exact baseline (Vaswani et al., 2017, equation 1)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import (
    attention_function,
    on_automatic_axes,
    out_spec,
    repeat_heads,
)
from skyformer_jax.attention.derivatives import with_rules
from skyformer_jax.attention.inputs import (
    equal_head_dims,
    floating_arrays,
    hide_masked,
    hide_unseen,
    known_options,
    with_all_axes,
    within_segments,
)
from skyformer_jax.attention.kernel_inputs import default_precision
from skyformer_jax.attention.platforms import (
    MASK,
    ROW_SUMS,
    ROWS,
    SCALAR,
    Kernels,
    by_platform,
    check_implementation,
)
from skyformer_jax.attention.softmax_kernels import GRADIENTS, VALUE
from skyformer_jax.attention.softmax_tiles import tiled_gradients, tiled_tangent, tiled_value

# Length of a tile of scores along the longer and the shorter of query and key, by platform.
_TILE = {"cpu": (1024, 128), "default": (8192, 1024)}

# The axes of the first arguments of the tiled functions and the kernels: query, key, value, scale.
_ARRAYS = (ROWS, ROWS, ROWS, SCALAR)

# Up to this many scores per head all are stored: tiles would save less than a millisecond there,
# and take longer to compile.
_DENSE_SCORES = 128 * 128


@attention_function(takes_groups=True, takes_explicit_axes=True)
def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    full_mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Computes softmax(scale * Q K^T + bias) V in memory linear in the length.

    Scores are computed tile by tile, and recomputed for gradients. If they are few or there is a
    bias, jax.nn.dot_product_attention computes the result and stores all scores.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, kv_heads, head_dim].
      value: [batch, kv_length, kv_heads, value_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused because nothing is random; part of the common signature.
      scale: factor of the scores; None means head_dim**-0.5.
      full_mask: bool, broadcastable to [batch, heads, q_length, kv_length], True where a query may
        attend to a key.
      bias: added to the scores, broadcastable to [batch, heads, q_length, kv_length].
      is_causal: True restricts query i to keys 0..i.
      segment_ids: int [batch, length], for self-attention: each position attends only to positions
        of its own segment. They are expanded to a full_mask of one byte per pair of positions.
      implementation: how the result is computed.

        - "dense": jax.nn.dot_product_attention, which stores all scores.
        - "chunked": stores one tile of scores at a time and recomputes it for gradients. It takes
          no bias.
        - "pallas": a kernel for NVIDIA GPUs and TPUs that stores no scores in memory. On a CPU the
          GPU kernel runs in interpret mode, slowly, for testing. It takes no full_mask, no bias and
          no float64.
        - "auto": dense for the smallest sizes and with a bias. Otherwise it depends on the platform
          that the program is compiled for: "pallas" where a kernel takes the arguments, else
          "chunked".

    Returns:
      [batch, q_length, heads, value_dim] in the dtype of value; zeros for a query that may not
      attend to any key.

    Raises:
      ValueError: if shapes do not fit, a mask is not boolean, or the implementation is unknown or
        does not take the arguments.
    """
    del rng
    check_implementation(implementation)
    full_mask = within_segments(full_mask, segment_ids, query, key)
    wide = jnp.float64 in (query.dtype, key.dtype, value.dtype)
    if implementation == "pallas" and (full_mask is not None or bias is not None or wide):
        raise ValueError(
            'implementation="pallas" takes no full_mask, no bias and no float64; choose "auto", '
            '"chunked" or "dense" for them'
        )
    if implementation == "chunked" and bias is not None:
        raise ValueError('implementation="chunked" takes no bias; choose "auto" or "dense" for it')
    key, value = hide_masked(key, value, mask)
    key, value = hide_unseen(query, key, value, full_mask, is_causal)
    factor: Any = query.shape[-1] ** -0.5 if scale is None else scale
    few = implementation == "auto" and query.shape[1] * key.shape[1] <= _DENSE_SCORES
    if few or implementation == "dense" or bias is not None:
        dense = functools.partial(_dense, is_causal=is_causal)
        more = mask, full_mask, bias, factor
        return on_automatic_axes(dense, out_spec(query, value), query, key, value, *more)
    if isinstance(factor, jax.core.Tracer):
        # A traced scale multiplies the queries, so that JAX derives its gradient.
        query = query.astype(jnp.float64 if wide else jnp.float32)
        query, factor = query * factor.astype(query.dtype), 1.0
    allowed = None if mask is None else mask[:, None, None, :]
    if full_mask is not None:
        allowed = full_mask if allowed is None else allowed & full_mask
    masks_keys = allowed is None or allowed.shape[1:] == (1, 1, key.shape[1])
    # Gradients are traced after the call, but must use the settings in effect during the call.
    function = _without_scores(
        implementation if masks_keys and not wide else "chunked",
        factor,
        allowed is not None,
        is_causal,
        default_precision(),
        tuple(_TILE.items()),
    )
    arrays = (query, key, value) if allowed is None else (query, key, value, allowed)
    return function(*arrays).astype(value.dtype)


@functools.cache
def _without_scores(
    implementation: str,
    scale: float,
    has_mask: bool,
    is_causal: bool,
    precision: str | None,
    tiles: tuple[tuple[str, tuple[int, int]], ...],
) -> Callable[..., jax.Array]:
    """Returns softmax attention as a function of query, key, value and an optional mask.

    It does not store all scores. Tangents and higher-order derivatives always use the tiled
    functions, not the kernels.

    Args:
      implementation: "auto", "chunked" or "pallas".
      scale: as in softmax_attention.
      has_mask: whether the function takes a mask.
      is_causal: as in softmax_attention.
      precision: the precision of products, a value of jax.default_matmul_precision.
      tiles: items of _TILE.
    """
    num_arrays = 4 if has_mask else 3
    axes = _ARRAYS + (MASK,) * has_mask

    def with_scale(function: Callable[..., Any]) -> Callable[..., Any]:
        """Adapts a function that takes a scale and a mask to the arrays that are stored."""

        def call(*arrays: jax.Array, **options: Any) -> Any:
            query, key, value, factor, *others = arrays
            more = others if has_mask else (None, *others)
            return function(query, key, value, factor, *more, is_causal=is_causal, **options)

        return call

    def on_platform(
        tiled: Callable[..., Any],
        kernels: Mapping[str, Callable[..., Any]],
        more: tuple[str, ...],
        results: Any,
        **options: Any,
    ) -> Callable[..., Any]:
        functions = {platform: with_scale(kernel) for platform, kernel in kernels.items()}
        interpreted = implementation == "pallas" and bool(kernels)
        known = Kernels(functions, (*axes, *more), results)
        plain = functools.partial(with_scale(tiled), **options)

        def call(*arrays: jax.Array) -> Any:
            factor = jnp.asarray(scale, jnp.float32)
            arrays = (*arrays[:3], factor, *arrays[3:])
            return by_platform(
                plain, precision, tiles, *arrays, kernels=known, interpreted=interpreted
            )

        return call

    rows = (ROWS,) * 3
    values, backward = ({}, {}) if implementation == "chunked" else (VALUE, GRADIENTS)
    value = on_platform(tiled_value, values, (), (ROWS, ROW_SUMS))
    tangent = on_platform(tiled_tangent, {}, (), ROWS)
    gradients = on_platform(tiled_gradients, backward, (ROWS, ROW_SUMS, ROWS), rows)
    whole = functools.partial(on_platform, kernels={}, more=(), skips=False)

    def anew(rule: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the rule with out and lse recomputed, so that they depend on the arrays too."""
        value = whole(tiled_value, results=())

        def call(*arrays: jax.Array) -> Any:
            given = arrays[:num_arrays]
            return rule(*given, *value(*given), *arrays[num_arrays + 2 :])

        return call

    def of_their_dtypes(rule: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: jax.Array) -> Any:
            found = rule(*arrays)
            return tuple(g.astype(x.dtype) for g, x in zip(found, arrays[:3], strict=True))

        return call

    return with_rules(
        value,
        tangent,
        of_their_dtypes(gradients),
        plain_tangent=anew(whole(tiled_tangent, results=())),
        plain_gradients=of_their_dtypes(anew(whole(tiled_gradients, results=()))),
    )


def _dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    full_mask: jax.Array | None,
    bias: jax.Array | None,
    scale: Any,
    *,
    is_causal: bool,
) -> jax.Array:
    """Computes softmax_attention with jax.nn.dot_product_attention."""
    allowed, bias = _restrictions(query, key, mask, full_mask, bias, is_causal)
    dtype, value_dim = _common_dtype(query, key, value), value.shape[-1]
    query, key, values = equal_head_dims(query, key, value)
    # JAX's own function mixes bfloat16 and float32, which strict promotion does not allow.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            query.astype(dtype),
            key.astype(dtype),
            values.astype(dtype),
            bias=bias,
            mask=allowed,
            scale=scale,
        )[..., :value_dim]
    if allowed is not None:
        # A row without any key would otherwise be the plain mean over the padding's values.
        some = jnp.moveaxis(allowed.any(axis=-1), 1, 2)[..., None]
        out = jnp.where(some, out, 0)
    return out.astype(value.dtype)


def softmax_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    full_mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Computes the weights softmax(scale * Q K^T + bias) of softmax_attention, for inspection.

    Args:
      query: [batch, q_length, heads, head_dim], as in softmax_attention.
      key: [batch, kv_length, kv_heads, head_dim], likewise.
      mask: likewise.
      scale: likewise.
      full_mask: likewise.
      bias: likewise.
      is_causal: likewise.
      segment_ids: likewise.

    Returns:
      [batch, heads, q_length, kv_length] in the common dtype of query and key; each row sums to 1,
      or is all zeros for a query that may not attend to any key.
    """
    query, key = floating_arrays(query, key)
    scale = known_options({"scale": scale})["scale"]
    key, _ = hide_masked(key, key, mask)
    full_mask = within_segments(full_mask, segment_ids, query, key)
    allowed, bias = _restrictions(query, key, mask, full_mask, bias, is_causal)
    dtype = _common_dtype(query, key)
    key = repeat_heads(key, query.shape[2]).astype(dtype)
    scores = jnp.einsum(
        "bqhp,bkhp->bhqk", query.astype(dtype), key, preferred_element_type=jnp.float32
    )
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        scores += bias.astype(jnp.float32)
    if allowed is None:
        return jax.nn.softmax(scores).astype(dtype)
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    some = allowed.any(axis=-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(scores), 0).astype(dtype)


def _common_dtype(*arrays: jax.Array) -> Any:
    """The dtype of products of the arrays, which may differ even if promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def _restrictions(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    full_mask: jax.Array | None,
    bias: jax.Array | None,
    is_causal: bool,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which keys a query may attend to, bool, and the bias; each has four axes or is None."""
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    allowed = None if mask is None else mask[:, None, None, :]
    if full_mask is not None:
        allowed = full_mask if allowed is None else allowed & full_mask
    if is_causal:
        earlier = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        allowed = earlier if allowed is None else allowed & earlier
    return allowed, None if bias is None else with_all_axes("bias", bias, shape)


def attend_to_split_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: jax.Array | float,
    axis_name: str | None,
) -> jax.Array:
    """Computes softmax(scale * Q K^T) V for few queries, present on all devices, and split keys.

    Args:
      query: float32 [batch, q_length, heads, head_dim].
      key: float32 [batch, kv_length, heads, head_dim], finite everywhere.
      value: likewise.
      mask: bool [batch, kv_length], True at real tokens.
      scale: factor of the scores.
      axis_name: mesh axis over which the keys are split; None if they are not.

    Returns:
      float32 [batch, q_length, heads, head_dim]; zeros for an example without any real key.
    """
    if axis_name is None:
        return softmax_attention(query, key, value, mask=mask, scale=scale)
    scores = scale * jnp.einsum("bqhp,bkhp->bhqk", query, key)
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    top = shards.pmax(scores.max(axis=-1, keepdims=True), axis_name)
    weights = jnp.exp(scores - jnp.maximum(top, jnp.finfo(scores.dtype).min))
    out = shards.psum(jnp.einsum("bhqk,bkhp->bqhp", weights, value), axis_name)
    mass = shards.psum(weights.sum(axis=-1), axis_name)
    mass = jnp.moveaxis(mass, 1, 2)[..., None]
    return out / jnp.where(mass > 0, mass, 1)
