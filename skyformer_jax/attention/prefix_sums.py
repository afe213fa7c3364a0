"""Causal attention by features, as prefix sums: linear in the length, with a state of fixed size.

If the kernel of an attention is a product of features, K(q, k) = phi(q) . psi(k), then

    out_i = sum_{j <= i} phi(q_i) . psi(k_j) v_j = phi(q_i)^T S_i,
    S_i = sum_{j <= i} psi(k_j) v_j^T

(Katharopoulos et al., 2020, section 3.2). S_i, [features, value_dim], is all that later positions
need from the earlier ones. Positions are processed in chunks: by products of features within a
chunk, and by S from chunk to chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards

# Positions per chunk: about as many as there are features, so that the products within chunks and
# those with the state cost the same.
CHUNK = 128

Features = Callable[[jax.Array], jax.Array]


class State(NamedTuple):
    """The state that causal attention by features keeps for the positions so far.

    Attributes:
      sums: float32 [batch, heads, features, value_dim], S over the last segment only.
      segment: int32 [batch], the segment of the last position; -1 before the first position.
    """

    sums: jax.Array
    segment: jax.Array


def empty_state(batch: int, heads: int, features: int, value_dim: int) -> State:
    """Returns the state before the first position."""
    sums = jnp.zeros((batch, heads, features, value_dim), jnp.float32)
    return State(sums, jnp.full((batch,), -1, jnp.int32))


def prefix_attention(
    of_queries: Features,
    of_keys: Features,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    state: State,
    segment_ids: jax.Array | None = None,
    bounds: bool = False,
    axis_name: str | None = None,
) -> tuple[jax.Array, State]:
    """Computes out_i = sum of phi(q_i) . psi(k_j) v_j over the j <= i of the segment of i.

    Features are computed chunk by chunk, and recomputed for gradients. Memory is therefore linear
    in the length and small: besides the arrays, one state per chunk.

    Args:
      of_queries: phi, a function from float32 [batch, chunk, heads, head_dim] to [batch, heads,
        chunk, features].
      of_keys: psi, likewise.
      query: [batch, length, heads, head_dim].
      key: likewise.
      value: [batch, length, heads, value_dim], 0 at masked positions.
      state: the state of the positions before the first one.
      segment_ids: int [batch, length]; positions attend only to their own segment. The positions of
        a segment must be consecutive. None means one segment.
      bounds: adds a feature to the output: the sum of |phi(q_i)| . psi(k_j) times the last feature
        of v_j, which bounds the last feature of the output.
      axis_name: name of a mesh axis, within jax.shard_map, over which the length is split. One
        state per device then crosses devices, whatever the length.

    Returns:
      float32 [batch, length, heads, value_dim (+ 1 with bounds)], and the state after the last
      position, on every device.
    """
    batch, length, heads, _ = query.shape
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    segments = _chunks(segment_ids.astype(jnp.int32), mode="edge")
    queries, keys, values = map(_chunks, (query, key, value))
    if axis_name is not None:
        skip = jax.checkpoint(functools.partial(_skip_chunk, of_keys))
        here, _ = jax.lax.scan(skip, _nothing(state), (keys, values, segments))
        state, after = _across(state, here, axis_name)
    attend = jax.checkpoint(functools.partial(_of_chunk, of_queries, of_keys, bounds))
    last, out = jax.lax.scan(attend, state, (queries, keys, values, segments))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, out.shape[-1])[:, :length]
    return out, last if axis_name is None else after


def _chunks(x: jax.Array, mode: str = "constant") -> jax.Array:
    """[batch, length, ...] -> [chunks, batch, chunk, ...].

    The last chunk is padded by jnp.pad with this mode. Zeros in the values add nothing to the sums.
    """
    batch, length = x.shape[:2]
    chunk = min(CHUNK, length)
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)), mode=mode)
    return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)


def _of_chunk(
    of_queries: Features, of_keys: Features, bounds: bool, state: State, arrays: Any
) -> tuple[State, jax.Array]:
    """The state after a chunk and its output, [batch, chunk, heads, ...], for jax.lax.scan."""
    queries, keys, values, segments = arrays
    phi, psi = of_queries(queries.astype(jnp.float32)), of_keys(keys.astype(jnp.float32))
    values = values.astype(jnp.float32)
    position = jnp.arange(segments.shape[1], dtype=jnp.int32)
    within = (position[:, None] >= position[None, :])[None]
    within &= segments[:, :, None] == segments[:, None, :]
    seen = (state.segment[:, None] == segments)[:, None, :, None]

    def sums(phi: jax.Array, values: jax.Array, before: jax.Array) -> jax.Array:
        products = jnp.einsum("bhcm,bhkm->bhck", phi, psi)
        products = jnp.where(within[:, None], products, 0)
        out = jnp.einsum("bhck,bkhv->bhcv", products, values)
        return out + jnp.where(seen, jnp.einsum("bhcm,bhmv->bhcv", phi, before), 0)

    out = sums(phi, values, state.sums)
    if bounds:
        bound = sums(jnp.abs(phi), values[..., -1:], state.sums[..., -1:])
        out = jnp.concatenate([out, jax.lax.stop_gradient(bound)], axis=-1)
    return _add(state, psi, values, segments), jnp.swapaxes(out, 1, 2)


def _skip_chunk(of_keys: Features, state: State, arrays: Any) -> tuple[State, None]:
    """The state after a chunk, for jax.lax.scan."""
    keys, values, segments = arrays
    psi = of_keys(keys.astype(jnp.float32))
    return _add(state, psi, values.astype(jnp.float32), segments), None


def _add(state: State, psi: jax.Array, values: jax.Array, segments: jax.Array) -> State:
    """The state after a chunk, from the state before it and its features and values."""
    last = segments[:, -1]
    of_last = (segments == last[:, None])[:, None, :, None]
    sums = jnp.einsum("bhcm,bchv->bhmv", jnp.where(of_last, psi, 0), values)
    return _after(state, State(sums, last))


def _after(state: State, more: State) -> State:
    """Combines the states of two consecutive runs of positions into the state after both."""
    goes_on = (state.segment == more.segment)[:, None, None, None]
    return State(jnp.where(goes_on, state.sums, 0) + more.sums, more.segment)


def _nothing(state: State) -> State:
    return State(jnp.zeros_like(state.sums), jnp.full_like(state.segment, -1))


def _across(state: State, here: State, axis_name: str) -> tuple[State, State]:
    """Returns the states before this device's first and after the last device's last position.

    Args:
      state: the state before the first device's first position.
      here: the state of this device's positions alone.
      axis_name: the mesh axis over which the length is split.
    """
    everywhere = jax.lax.all_gather(here, axis_name)

    def add(state: State, shard: State) -> tuple[State, State]:
        return _after(state, shard), state

    after, before = jax.lax.scan(add, state, everywhere)
    index = shards.shard_index(axis_name)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), before), after
