"""Causal attention by features, as prefix sums: linear in the length, with a state of fixed size.

Where the kernel of an attention is a product of features, K(q, k) = phi(q) . psi(k),

    out_i = sum_{j <= i} phi(q_i) . psi(k_j) v_j = phi(q_i)^T S_i,
    S_i = sum_{j <= i} psi(k_j) v_j^T

(Katharopoulos et al., 2020, section 3.2), and S_i, [features, value_dim], is all that later
positions need of the earlier ones. Chunks of positions are computed at once: within a chunk by the
products of features, from chunk to chunk by S.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards

# Positions of a chunk: about as many as there are features, so that the products within chunks and
# those with the state cost the same.
CHUNK = 128

Features = Callable[[jax.Array], jax.Array]


class State(NamedTuple):
    """What a causal attention by features keeps of the positions so far.

    Attributes:
      sums: float32 [batch, heads, features, value_dim], S; of the last segment alone.
      segment: int32 [batch], the segment of the last position; -1 before the first.
    """

    sums: jax.Array
    segment: jax.Array


def empty_state(batch: int, heads: int, features: int, value_dim: int) -> State:
    """The state before the first position."""
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
    chunk: int = CHUNK,
) -> tuple[jax.Array, State]:
    """out_i = sum over the j <= i of its segment of phi(q_i) . psi(k_j) v_j.

    Features are computed chunk by chunk, and again for gradients, so that memory is linear in the
    length and small: beside the arrays, a state for each chunk.

    Args:
      of_queries: phi, of float32 [batch, chunk, heads, head_dim] to [batch, heads, chunk,
        features].
      of_keys: psi, likewise.
      query: [batch, length, heads, head_dim].
      key: likewise.
      value: [batch, length, heads, value_dim], 0 at masked positions.
      state: of the positions before the first.
      segment_ids: int [batch, length]; positions of one segment are consecutive, and see that
        segment alone. None means one segment.
      bounds: adds a feature to the output: the sum of |phi(q_i)| . psi(k_j) times the last feature
        of v_j, which bounds the last feature of the output.
      axis_name: name of a mesh axis, within jax.shard_map, that divides the length. One state a
        device then crosses devices, whatever the length.
      chunk: positions of a chunk.

    Returns:
      float32 [batch, length, heads, value_dim (+ 1 with bounds)], and the state after the last
      position, on every device.
    """
    batch, length, heads, _ = query.shape
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    chunk = min(chunk, length)

    def chunked(x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [chunks, batch, chunk, ...]; positions after the end repeat."""
        missing = -length % chunk
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)), mode="edge")
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    real = jnp.ones((batch, length), bool)
    real = jnp.pad(real, ((0, 0), (0, -length % chunk)))
    real = jnp.moveaxis(real.reshape(batch, -1, chunk), 1, 0)
    keys, values, segments = chunked(key), chunked(value), chunked(segment_ids.astype(jnp.int32))

    def add(state: State, keys: jax.Array, values: jax.Array, segments: jax.Array) -> State:
        last = segments[:, -1]
        of_last = (segments == last[:, None])[:, None, :, None]
        sums = jnp.einsum("bhcm,bchv->bhmv", jnp.where(of_last, keys, 0), values)
        goes_on = (state.segment == last)[:, None, None, None]
        return State(jnp.where(goes_on, state.sums, 0) + sums, last)

    def loaded(x: jax.Array, real: jax.Array) -> jax.Array:
        return jnp.where(real[:, :, None, None], x, 0).astype(jnp.float32)

    @jax.checkpoint
    def of_chunk(state: State, arrays: Any) -> tuple[State, jax.Array]:
        queries, keys, values, segments, real = arrays
        phi, psi = of_queries(queries.astype(jnp.float32)), of_keys(keys.astype(jnp.float32))
        values = loaded(values, real)
        position = jnp.arange(chunk, dtype=jnp.int32)
        within = position[:, None] >= position[None, :]
        within = within[None] & (segments[:, :, None] == segments[:, None, :])
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
        return add(state, psi, values, segments), jnp.swapaxes(out, 1, 2)

    @jax.checkpoint
    def skip_chunk(state: State, arrays: Any) -> tuple[State, None]:
        keys, values, segments, real = arrays
        return add(state, of_keys(keys.astype(jnp.float32)), loaded(values, real), segments), None

    if axis_name is not None:
        here, _ = jax.lax.scan(skip_chunk, _nothing(state), (keys, values, segments, real))
        state, after = _across(state, here, axis_name)
    last, out = jax.lax.scan(of_chunk, state, (chunked(query), keys, values, segments, real))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, out.shape[-1])[:, :length]
    return out, last if axis_name is None else after


def _nothing(state: State) -> State:
    return State(jnp.zeros_like(state.sums), jnp.full_like(state.segment, -1))


def _across(state: State, here: State, axis_name: str) -> tuple[State, State]:
    """The state before this device's first position, and that after the last device's last.

    Args:
      state: before the first device's first position.
      here: of this device's positions alone.
      axis_name: the mesh axis.
    """
    everywhere = jax.lax.all_gather(here, axis_name)

    def add(state: State, shard: State) -> tuple[State, State]:
        goes_on = (state.segment == shard.segment)[:, None, None, None]
        return State(jnp.where(goes_on, state.sums, 0) + shard.sums, shard.segment), state

    after, before = jax.lax.scan(add, state, everywhere)
    index = shards.shard_index(axis_name)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), before), after
