"""A diagnostic of how well Skyformer's landmarks represent the queries and keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import (
    check_shapes,
    on_automatic_axes,
    repeat_heads,
    spec_of,
)
from skyformer_jax.attention.gaussian import gaussian_scores
from skyformer_jax.attention.inputs import (
    floating_arrays,
    hide,
    hide_masked,
    known_options,
    masks_or_all,
)
from skyformer_jax.attention.landmark_choice import concatenated, find_landmarks
from skyformer_jax.attention.skyformer import check_skyformer_options, solve_landmarks

_ROWS = 16_384  # rows of a block; its kernel matrix with the landmarks is in memory


def nystrom_residual(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    *,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    num_landmarks: int = 128,
    landmarks: str | jax.Array = "uniform",
    landmark_indices: jax.Array | None = None,
    query_mask: jax.Array | None = None,
    gamma: jax.Array | float = 0.1,
    inverse: str = "schulz",
    num_iterations: int = 6,
    normalize: bool = False,
    conv_kernel: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
    axis_name: str | None = None,
) -> jax.Array:
    """Measures how much of the kernel skyformer_attention's landmarks miss, at linear cost.

    It is the mean, over the real rows x of [query; key], of

        1 - G(x, L) M^-1 G(L, x),   M = G(L, L) + gamma I,

    the residual of the Nystrom method on the kernel's diagonal, G(x, x) = 1. It is 0 if the
    landmarks span all rows and 1 if no row is near a landmark. A large residual means that the rows
    lie too far apart for the number of landmarks; skyformer_attention then returns much less than
    kernelized_attention. docs/skyformer.md shows how its error depends on the residual.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, kv_heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens.
      rng: as in skyformer_attention, so that the same landmarks are drawn.
      scale: likewise.
      num_landmarks: likewise.
      landmarks: likewise.
      landmark_indices: likewise.
      query_mask: likewise.
      gamma: likewise. The residual of a landmark far from all others is gamma / (1 + gamma).
      inverse: likewise.
      num_iterations: likewise.
      normalize: unused; accepted so that the options of skyformer_attention can be passed on.
      conv_kernel: likewise.
      is_causal: likewise.
      segment_ids: likewise.
      implementation: likewise.
      axis_name: likewise.

    Returns:
      float32 [batch, heads]; 0 for an example without any real row.

    Raises:
      ValueError: if shapes do not fit, a mask is not boolean, or an option is out of range.
    """
    del normalize, conv_kernel, is_causal, segment_ids, implementation
    query, key = floating_arrays(query, key)
    check_shapes(query, key, key)
    batch, _, heads, head_dim = query.shape
    given = {"mask": mask, "query_mask": query_mask, "landmark_indices": landmark_indices}
    mask, query_mask, landmark_indices = known_options(given).values()
    scale = head_dim**-0.5 if scale is None else scale
    scale, gamma = known_options({"scale": scale, "gamma": gamma}).values()
    check_skyformer_options(landmarks, num_landmarks, scale, gamma, inverse, num_iterations)
    if 0 in (*query.shape, *key.shape):
        return jnp.zeros((batch, heads), jnp.float32)
    key, _ = hide_masked(key, key, mask)

    def residual(
        query: jax.Array, key: jax.Array, masks: tuple[jax.Array, jax.Array], *arrays: Any
    ) -> jax.Array:
        key = repeat_heads(key, heads)
        points, valid = find_landmarks(
            query,
            key,
            masks,
            *arrays,
            num_landmarks=num_landmarks,
            axis_name=axis_name,
        )
        *_, scale, gamma, _ = arrays
        solve = functools.partial(solve_landmarks, inverse=inverse, num_iterations=num_iterations)

        def seen(rows: jax.Array, real: jax.Array) -> jax.Array:
            """[batch, heads]: the sum of G(x, L) M^-1 G(L, x) over the real rows x of a block."""
            scores = gaussian_scores(points, hide(rows, real).astype(jnp.float32), scale)
            scores = jnp.where(real[:, None, None], jnp.moveaxis(scores, 1, 2), 0)
            return (hide(scores, valid) * solve(points, valid, scores, scale, gamma)).sum((1, 3))

        total = _sum_over_rows(seen, concatenated(query, key), jnp.concatenate(masks, 1))
        count = jnp.concatenate(masks, axis=1).sum(axis=1, dtype=jnp.int32)[:, None]
        total, count = (shards.psum(x, axis_name) for x in (total, count.astype(jnp.float32)))
        return jnp.where(count > 0, 1 - total / jnp.maximum(count, 1), 0)

    batch_axes, _, head_axes, _ = spec_of(query)
    masks = masks_or_all(query, key, mask, query_mask)
    arrays = (query, key, masks, rng, landmark_indices, scale, gamma, landmarks)
    return on_automatic_axes(residual, (batch_axes, head_axes), *arrays)


def _sum_over_rows(
    function: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array, real: jax.Array
) -> jax.Array:
    """Sums function(rows, real) over blocks of rows, to bound the memory.

    Args:
      function: takes a block of rows, [batch, size, heads, head_dim], and bool [batch, size].
      rows: [batch, rows, heads, head_dim].
      real: bool [batch, rows], True at the rows that count.
    """
    length = rows.shape[1]
    num_blocks = -(-length // _ROWS)
    size = -(-length // num_blocks)
    missing = num_blocks * size - length

    def in_blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)

    if num_blocks == 1:
        return function(rows, real)
    return jax.lax.map(lambda block: function(*block), (in_blocks(rows), in_blocks(real))).sum(0)
