"""Skyformer's landmarks: chosen among the rows of [query; key], or given."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.inputs import fixed_key, hide, take_rows
from skyformer_jax.attention.landmarks import (
    kmeans_landmarks,
    leverage_landmarks,
    segment_means,
    strided_landmarks,
    uniform_landmarks,
)

LANDMARKS = ("uniform", "strided", "segment_means", "kmeans++", "leverage")


def find_landmarks(
    query: jax.Array,
    key: jax.Array,
    masks: tuple[jax.Array, jax.Array],
    rng: jax.Array | None,
    landmark_indices: jax.Array | None,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    landmarks: str | jax.Array,
    *,
    num_landmarks: int,
    axis_name: str | None,
) -> list[jax.Array]:
    """Returns the landmarks, float32 [batch, d, heads, head_dim], and bool [batch, d], which count.

    The arguments are those of skyformer_attention, except that masks holds the query mask and the
    key mask.
    """
    if not isinstance(landmarks, str):
        return _given_landmarks(query, landmarks)
    candidates = jnp.concatenate(masks, axis=1)
    rows = hide(concatenated(query, key), candidates)
    if landmark_indices is None:
        num_landmarks = min(num_landmarks, rows.shape[1] * shards.num_shards(axis_name))
        found = choose_landmarks(
            landmarks,
            rng,
            rows,
            masks,
            num_landmarks,
            scale=scale,
            gamma=gamma,
            axis_name=axis_name,
        )
    else:
        _check_indices(landmark_indices, len(query))
        landmark_indices = landmark_indices.astype(jnp.int32)
        positions = _positions(masks, axis_name)
        indices = jnp.minimum(jnp.searchsorted(positions, landmark_indices), len(positions) - 1)
        here = positions[indices] == landmark_indices
        here &= jnp.take_along_axis(candidates, indices, axis=1)
        found = _gathered(rows, indices, here, axis_name)
    return list(found)


def concatenated(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns [query; key]; their dtypes may differ even if promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.concatenate([query, key], axis=1)


def _given_landmarks(query: jax.Array, landmarks: jax.Array) -> list[jax.Array]:
    """Repeats landmarks [d, heads, head_dim] for each example; also returns that all are valid."""
    if landmarks.ndim != 3 or landmarks.shape[1:] != query.shape[2:] or not len(landmarks):
        raise ValueError(
            "an array of landmarks must be [num_landmarks, heads, head_dim] with heads and "
            f"head_dim of query, {query.shape[2:]}; got {landmarks.shape}"
        )
    points = landmarks.astype(jnp.float32)[None]
    shape = (len(query), *landmarks.shape)
    return [jnp.broadcast_to(points, shape), jnp.ones(shape[:2], bool)]


def _check_indices(indices: jax.Array, batch: int) -> None:
    integers = jnp.issubdtype(indices.dtype, jnp.integer)
    if not integers or indices.ndim != 2 or indices.shape[0] not in (1, batch):
        raise ValueError(
            f"landmark_indices must be int [batch = {batch}, num_landmarks]; "
            f"got {indices.dtype} {indices.shape}"
        )


def choose_landmarks(
    kind: str,
    rng: jax.Array | None,
    rows: jax.Array,
    masks: Sequence[jax.Array],
    num_landmarks: int,
    *,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses landmarks by one of the methods that skyformer_attention documents.

    Args:
      kind: the method, one of LANDMARKS.
      rng: a jax.random key, or None.
      rows: [batch, rows, heads, head_dim], finite everywhere: queries, then keys.
      masks: bool [batch, q_length] and [batch, kv_length], the rows that count.
      num_landmarks: d, at most the number of rows.
      scale: the Gaussian kernel's inverse squared width.
      gamma: the number added to M's diagonal; "leverage" uses it as its minimum ridge.
      axis_name: mesh axis over which queries and keys are split.

    Returns:
      The landmarks [batch, d, heads, head_dim] and bool [batch, d], which of them count; the same
      on all devices.

    Raises:
      ValueError: if the rows are split and the method needs all of them on one device.
    """
    candidates = jnp.concatenate(masks, axis=1)
    running_counts, counts = shards.running_counts(masks, axis_name)
    if kind == "segment_means":
        num_segments = jnp.minimum(counts, num_landmarks)
        means = segment_means(
            rows.astype(jnp.float32),
            candidates,
            num_landmarks,
            num_segments,
            running_counts,
            counts,
            axis_name,
        )
        return means, jnp.arange(num_landmarks, dtype=jnp.int32)[None] < num_segments[:, None]
    if kind == "uniform" and rng is not None:
        positions = _positions(masks, axis_name)
        indices, here = uniform_landmarks(rng, candidates, num_landmarks, positions, axis_name)
    elif kind in ("uniform", "strided"):
        indices, here = strided_landmarks(candidates, num_landmarks, running_counts, counts)
    else:
        if axis_name is not None:
            raise ValueError(
                f"landmarks={kind!r} needs the whole sequence on one device; where it is split, "
                "choose uniform, strided or segment_means"
            )
        rng = fixed_key() if rng is None else rng
        still = jax.lax.stop_gradient(rows.astype(jnp.float32))
        if kind == "kmeans++":
            indices, here = kmeans_landmarks(rng, still, candidates, num_landmarks)
        else:
            indices, here = leverage_landmarks(
                rng, still, candidates, num_landmarks, scale=scale, ridge=gamma
            )
    return _gathered(rows, indices, here, axis_name)


def _positions(masks: Sequence[jax.Array], axis_name: str | None) -> jax.Array:
    """int32 [rows]: positions of this shard's queries and keys in the whole [queries; keys]."""
    first, found = 0, []
    for mask in masks:
        found.append(first + shards.positions(mask.shape[1], axis_name))
        first += mask.shape[1] * shards.num_shards(axis_name)
    return jnp.concatenate(found)


def _gathered(
    rows: jax.Array, indices: jax.Array, here: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Gathers each landmark from the device that holds it; also returns whether a device does."""
    points = hide(take_rows(rows, indices).astype(jnp.float32), here)
    valid = shards.psum(here.astype(jnp.int32), axis_name) > 0
    return shards.psum(points, axis_name), valid
