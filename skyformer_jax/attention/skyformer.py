"""Skyformer: Kernelized Attention by a Nystrom method (Chen et al., 2021, section 4.2).

With d landmarks L drawn from the rows of [Q; K], and M = G(L, L) + gamma I,

    out = G(Q, L) M^-1 (G(L, K) V),

linear in the length. The kernel matrix of queries and keys together is positive semi-definite,
which G(Q, K) alone is not; that completion is what makes the Nystrom method sound here.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import (
    attention_function,
    on_automatic_axes,
    spec_of,
)
from skyformer_jax.attention.gaussian import gaussian_attention, gaussian_scores
from skyformer_jax.attention.inputs import (
    check_at_least,
    check_not_negative,
    fixed_key,
    hide,
    hide_masked,
    masks_or_all,
    take_rows,
)
from skyformer_jax.attention.inverses import matmul, schulz_inverse
from skyformer_jax.attention.landmarks import (
    kmeans_landmarks,
    leverage_landmarks,
    segment_means,
    strided_landmarks,
    uniform_landmarks,
)

INVERSES = ("schulz", "cholesky")
LANDMARKS = ("uniform", "strided", "segment_means", "kmeans++", "leverage")


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
    """The landmarks of skyformer_attention, by the kinds it documents.

    Args:
      kind: of LANDMARKS.
      rng: a jax.random key, or None.
      rows: [batch, rows, heads, head_dim], finite everywhere: queries, then keys.
      masks: bool [batch, q_length] and [batch, kv_length], the rows that count.
      num_landmarks: d, at most the number of rows.
      scale: the Gaussian kernel's inverse squared width.
      gamma: what M has on its diagonal beside the kernel; "leverage" takes it as its least ridge.
      axis_name: mesh axis over which queries and keys are split.

    Returns:
      [batch, d, heads, head_dim] and bool [batch, d], which of them count; the same on all devices.

    Raises:
      ValueError: if the rows are split and the kind needs all of them on one device.
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
    """The landmarks, each from the device that holds it, and whether a device does."""
    points = hide(take_rows(rows, indices).astype(jnp.float32), here)
    valid = shards.psum(here.astype(jnp.int32), axis_name) > 0
    return shards.psum(points, axis_name), valid


def check_skyformer_options(
    landmarks: str,
    num_landmarks: int,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    inverse: str,
    num_iterations: int,
) -> None:
    """Raises an error for an option that cannot work; traced numbers are not known."""
    if inverse not in INVERSES:
        raise ValueError(f"inverse must be one of {', '.join(INVERSES)}; got {inverse!r}")
    if landmarks not in LANDMARKS:
        raise ValueError(f"landmarks must be one of {', '.join(LANDMARKS)}; got {landmarks!r}")
    check_at_least(1, num_landmarks=num_landmarks, num_iterations=num_iterations)
    check_not_negative(scale=scale, gamma=gamma)
    if landmarks == "leverage" and not isinstance(gamma, jax.core.Tracer) and gamma == 0:
        raise ValueError(
            'landmarks="leverage" needs a gamma above 0, the least ridge of its scores'
        )


@attention_function(takes_explicit_axes=True)
def skyformer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    num_landmarks: int = 128,
    landmarks: str = "uniform",
    landmark_indices: jax.Array | None = None,
    query_mask: jax.Array | None = None,
    gamma: jax.Array | float = 0.1,
    inverse: str = "schulz",
    num_iterations: int = 6,
    implementation: str = "auto",
    axis_name: str | None = None,
) -> jax.Array:
    """Skyformer attention: kernelized_attention approximated in time linear in the length.

    out = G(Q, L) (G(L, L) + gamma I)^-1 G(L, K) V (Chen et al., 2021, equation 6). With all real
    rows as landmarks and gamma -> 0 it is kernelized_attention exactly.

    It approximates well where every query and key has landmarks within a few times scale**-0.5 of
    it, and loses mass where not: with 128 landmarks, 1,024 rows and 32 normal features the relative
    error is 0.01 at a standard deviation of 0.25, 0.13 at 1/sqrt(3), with which this package's
    layers start, and 0.66 at 1. nystrom_residual shows it; docs/skyformer.md has the table.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: a jax.random key to draw the landmarks by; None is deterministic.
      scale: the kernel's inverse squared width; None means head_dim**-0.5.
      num_landmarks: d, shared by the heads of an example; more than there are rows means all.
      landmarks: how they are chosen among the real rows of [query; key]:

        - "uniform": drawn uniformly; without rng, as "strided".
        - "strided": evenly spread over the positions.
        - "segment_means": means of d equal runs of positions (Xiong et al., 2021).
        - "kmeans++": the seeds of k-means++, far from each other; a sequential loop of d steps.
        - "leverage": by ridge leverage scores (Musco and Musco, 2017), the paper's next
          step; the cost of two more kernel matrices of rows x d and of some d x d eigenvalues.

        The last two take a fixed key where rng is None. Draws by "uniform" and "leverage" are
        others for another padded length.
      landmark_indices: int [batch, d], rows of [query; key] (0..q_length-1 are queries) to use
        instead of num_landmarks chosen here; those at masked rows, and those that
        no row has, count for nothing.
      query_mask: bool [batch, q_length], the queries that may become landmarks; None means
        `mask` where q_length == kv_length (self-attention), otherwise all. No output depends on
        what stands at other queries, but their own.
      gamma: regularisation of the landmarks' kernel matrix.
      inverse: "schulz" (matrix products only) or "cholesky" (exact to rounding).
      num_iterations: of the Schulz iteration.
      implementation: of the two Gaussian passes: "auto", "dense", "chunked" or "pallas", see
        gaussian.gaussian_attention.
      axis_name: name of a mesh axis, within jax.shard_map: each device has a run of the sequence,
        as long as the others', of query, key, value and the masks. Only the landmarks, and their
        context of d x head_dim, then cross devices, whatever the length. num_landmarks and
        landmark_indices are of the whole; landmarks must be "uniform", "strided" or
        "segment_means".

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or an option is out of range.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_skyformer_options(landmarks, num_landmarks, scale, gamma, inverse, num_iterations)
    dtype = value.dtype
    key, value = hide_masked(key, value, mask)

    masks = masks_or_all(query, key, mask, query_mask)
    batch_axes, _, head_axes, _ = spec_of(query)
    find = functools.partial(
        find_landmarks, kind=landmarks, num_landmarks=num_landmarks, axis_name=axis_name
    )
    specs = [(batch_axes, None, head_axes, None), (batch_axes, None)]
    arrays = (query, key, masks, rng, landmark_indices, scale, gamma)
    points, valid = on_automatic_axes(find, specs, *arrays)
    passes = functools.partial(gaussian_attention, scale=scale, implementation=implementation)
    context = shards.psum(passes(points, key, value), axis_name)
    solve = functools.partial(solve_landmarks, inverse=inverse, num_iterations=num_iterations)
    weights = on_automatic_axes(solve, specs[0], points, valid, context, scale, gamma)
    return passes(query, points, weights).astype(dtype)


def find_landmarks(
    query: jax.Array,
    key: jax.Array,
    masks: tuple[jax.Array, jax.Array],
    rng: jax.Array | None,
    landmark_indices: jax.Array | None,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    *,
    kind: str,
    num_landmarks: int,
    axis_name: str | None,
) -> list[jax.Array]:
    """The landmarks, float32 [batch, d, heads, head_dim], and bool [batch, d], which count."""
    candidates = jnp.concatenate(masks, axis=1)
    rows = hide(concatenated(query, key), candidates)
    if landmark_indices is None:
        num_landmarks = min(num_landmarks, rows.shape[1] * shards.num_shards(axis_name))
        found = choose_landmarks(
            kind, rng, rows, masks, num_landmarks, scale=scale, gamma=gamma, axis_name=axis_name
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
    """[query; key], of dtypes that may differ even where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.concatenate([query, key], axis=1)


def _check_indices(indices: jax.Array, batch: int) -> None:
    integers = jnp.issubdtype(indices.dtype, jnp.integer)
    if not integers or indices.ndim != 2 or indices.shape[0] not in (1, batch):
        raise ValueError(
            f"landmark_indices must be int [batch = {batch}, num_landmarks]; "
            f"got {indices.dtype} {indices.shape}"
        )


def solve_landmarks(
    points: jax.Array,
    valid: jax.Array,
    rows: jax.Array,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    *,
    inverse: str,
    num_iterations: int,
) -> jax.Array:
    """M^-1 rows for M = G(points, points) + gamma I.

    Landmarks that are not valid are cut out of M, which gets a 1 on its diagonal there, and of
    rows, so that they add exactly nothing.

    Args:
      points: float32 [batch, d, heads, head_dim].
      valid: bool [batch, d].
      rows: float32 [batch, d, heads, any].
      scale: the kernel's inverse squared width.
      gamma: regularisation of M.
      inverse: of INVERSES.
      num_iterations: of the Schulz iteration.

    Returns:
      float32 [batch, d, heads, any].
    """
    both_valid = (valid[:, :, None] & valid[:, None, :])[:, None]
    eye = jnp.eye(valid.shape[1], dtype=jnp.float32)[None, None]
    diagonal = jnp.where(valid, gamma, 1.0).astype(jnp.float32)[:, None, :, None] * eye
    m = jnp.where(both_valid, gaussian_scores(points, points, scale), 0) + diagonal
    rows = jnp.moveaxis(hide(rows, valid), 2, 1)  # [batch, heads, d, any], as M's [..., d, d]
    if inverse == "schulz":
        solved = matmul(schulz_inverse(m, num_iterations), rows)
    else:
        solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(m), rows)
    return jnp.moveaxis(solved, 1, 2)
