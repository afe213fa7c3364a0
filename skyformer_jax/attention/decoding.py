"""Decoding: causal attention of a few positions at a time, with a state for the positions before.

Skyformer and Performer keep a state whose size does not depend on the length. Softmax and
kernelized attention keep the keys and values of all positions.

    state = init_decoding("skyformer", batch=1, heads=2, head_dim=32, landmarks=landmarks)
    out, state = decode("skyformer", state, query, key, value, landmarks=landmarks)  # a prompt
    out, state = decode("skyformer", state, query, key, value, landmarks=landmarks)  # and a token
"""

from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention.common import check_shapes, repeat_heads
from skyformer_jax.attention.inputs import fixed_key, floating_arrays, hide_masked
from skyformer_jax.attention.performer import causal_performer, orthogonal_features
from skyformer_jax.attention.prefix_sums import empty_state
from skyformer_jax.attention.registry import REGISTRY, get_entry, split_options
from skyformer_jax.attention.skyformer_causal import causal_skyformer, initial_state

DECODABLE = tuple(name for name, entry in REGISTRY.items() if "is_causal" in entry.masks)

State = dict[str, Any]


def init_decoding(
    name: str,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    max_length: int | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> State:
    """Returns the state before the first position.

    Args:
      name: the attention, one of DECODABLE.
      batch: number of sequences.
      heads: number of heads.
      head_dim: features of each head of queries and keys.
      kv_heads: number of heads of keys and values; None means heads.
      value_dim: the values' head_dim; None means head_dim.
      max_length: the maximum number of positions, required for softmax and kernelized.
      dtype: the dtype of the keys and values that softmax and kernelized keep.
      **options: options of the attention function, as for decode.

    Returns:
      A dict of arrays; "index" is the number of positions so far.

    Raises:
      ValueError: if the attention has no causal form, or if max_length or the array of landmarks
        is missing.
    """
    options = _options(name, options)
    value_dim = value_dim or head_dim
    state: State = {"index": jnp.int32(0)}
    if name == "skyformer":
        conv_kernel = options.get("conv_kernel")
        state["prefix"], state["recent"] = initial_state(
            *(batch, heads, value_dim, len(_landmarks(options))),
            normalize=options.get("normalize", False),
            conv_size=0 if conv_kernel is None else len(conv_kernel),
        )
    elif name == "performer":
        features = len(_projection(options, head_dim))
        state["prefix"] = empty_state(batch, heads, features, value_dim + 1)
    else:
        if max_length is None:
            raise ValueError(f"{name} keeps all keys and values: give max_length")
        state["key"] = jnp.zeros((batch, max_length, kv_heads or heads, head_dim), dtype)
        state["value"] = jnp.zeros((batch, max_length, kv_heads or heads, value_dim), dtype)
        state["mask"] = jnp.zeros((batch, max_length), bool)
    return state


def decode(
    name: str,
    state: State,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, State]:
    """Computes causal attention for the positions after those of the state, one or many at a time.

    The result equals that of the attention function with is_causal=True on all positions so far,
    up to rounding.

    Args:
      name: the attention, one of DECODABLE.
      state: from init_decoding or an earlier call.
      query: [batch, length, heads, head_dim], unscaled.
      key: [batch, length, kv_heads, head_dim].
      value: [batch, length, kv_heads, value_dim].
      mask: bool [batch, length], True at real tokens.
      **options: options of the attention function, the same in all calls: skyformer needs an array
        of landmarks, performer may be given its projection.

    Returns:
      [batch, length, heads, value_dim] in the dtype of value, and the next state. For softmax and
      kernelized, the result is NaN if the positions so far exceed max_length.

    Raises:
      ValueError: if the attention has no causal form, or shapes do not fit.
    """
    options = _options(name, options)
    query, key, value = floating_arrays(query, key, value)
    check_shapes(query, key, value)
    key, value = hide_masked(key, value, mask)
    length, head_dim = query.shape[1], query.shape[-1]
    dtype, index = value.dtype, state["index"]
    scale = options.pop("scale", None)
    scale = head_dim**-0.5 if scale is None else scale
    state = {**state, "index": index + length}
    if "prefix" in state:
        key, value = (repeat_heads(x, query.shape[2]) for x in (key, value))
    if name == "skyformer":
        landmarks = _landmarks(options)
        out, (state["prefix"], state["recent"]) = causal_skyformer(
            *(query, key, value, mask, landmarks, options.get("conv_kernel"), None),
            (state["prefix"], state["recent"]),
            *(scale, options.get("gamma", 0.1)),
            inverse=options.get("inverse", "schulz"),
            num_iterations=options.get("num_iterations", 6),
            normalize=options.get("normalize", False),
        )
        return out.astype(dtype), state
    if name == "performer":
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        projection = _projection(options, head_dim)
        out, state["prefix"] = causal_performer(
            query, key, value, mask, projection, None, state["prefix"], scale
        )
        return out.astype(dtype), state

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), index, axis=1)

    mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
    new = {"key": key, "value": value, "mask": mask}
    state |= {part: put(state[part], x) for part, x in new.items()}
    positions = jnp.arange(state["key"].shape[1], dtype=jnp.int32)
    earlier = positions[None, :] <= index + jnp.arange(length, dtype=jnp.int32)[:, None]
    out = REGISTRY[name].function(
        *(query, state["key"].astype(key.dtype), state["value"].astype(dtype)),
        mask=state["mask"],
        full_mask=earlier[None, None],
        scale=scale,
        **options,
    )
    return jnp.where(state["index"] <= len(positions), out, jnp.nan), state


def check_decodable(name: str) -> None:
    """Raises a ValueError if the attention is unknown or has no causal form."""
    get_entry(name)
    if name not in DECODABLE:
        raise ValueError(f"{name} is not causal; those that can decode: {', '.join(DECODABLE)}")


def _options(name: str, options: State) -> State:
    """Selects the options of the attention function.

    Raises:
      ValueError: if the attention has no causal form or does not have one of the options.
    """
    check_decodable(name)
    return split_options(name, options)[0]


def _landmarks(options: State) -> jax.Array:
    landmarks = options.get("landmarks", "uniform")
    if isinstance(landmarks, str):
        raise ValueError(
            "skyformer decodes with an array of landmarks [num_landmarks, heads, head_dim]; in a "
            'layer, landmarks="learned" makes that array a parameter'
        )
    return jnp.asarray(landmarks)


def _projection(options: State, head_dim: int) -> jax.Array:
    projection = options.get("projection")
    if projection is None:
        rng = options.get("rng")
        shape = (options.get("num_features", 128), head_dim)
        projection = orthogonal_features(fixed_key() if rng is None else rng, shape)
    return jnp.asarray(projection).astype(jnp.float32)
