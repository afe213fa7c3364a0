"""Methods of choosing d landmarks among the real rows of each example.

An example's landmarks do not depend on the other examples of the batch, and all its heads share
them. strided_landmarks, uniform_landmarks and segment_means also work on rows that are split over
devices (attention/shards.py), and then give the same result as on the whole rows.
"""

import functools
import math

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.gaussian import gaussian_scores
from skyformer_jax.attention.inputs import zeros_like
from skyformer_jax.attention.random_bits import random_bits


def strided_landmarks(
    candidates: jax.Array,
    num_landmarks: int,
    running_counts: jax.Array | None = None,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns landmarks at even strides over each example's candidate rows; nothing is random.

    Args:
      candidates: bool [batch, rows], the rows that may become landmarks.
      num_landmarks: d, the number of landmarks of each example.
      running_counts: int32 [batch, rows], from shards.running_counts, if the rows are split.
      counts: int32 [batch], the number of all candidates, likewise.

    Returns:
      indices int32 [batch, d] and valid bool [batch, d]. An example with c < d candidates gets
      each of them once and has d - c invalid entries. An entry whose row is on another device is
      also invalid.
    """
    if running_counts is None or counts is None:
        running_counts, counts = shards.running_counts([candidates], None)
    counts = counts[:, None]
    slots = jnp.arange(num_landmarks, dtype=jnp.int32)[None, :]
    # The middles of d equal parts of the candidates' ranks, floor((2i + 1) c / 2d), computed from
    # c // d and c % d so that the product does not overflow.
    whole, rest = counts // num_landmarks, counts % num_landmarks
    middles = (2 * slots + 1) * whole + (2 * slots + 1) * rest // num_landmarks
    ranks = jnp.where(counts < num_landmarks, slots, middles // 2)
    indices = _first_at_least(running_counts, ranks + 1)
    indices = jnp.minimum(indices, candidates.shape[1] - 1).astype(jnp.int32)

    def at(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, indices, axis=1)

    here = at(candidates) & (at(running_counts) == ranks + 1)
    return indices, here & (slots < counts)


def _first_at_least(ascending: jax.Array, targets: jax.Array) -> jax.Array:
    """Index of the first entry that is at least the target; the length if there is none.

    A binary search like that of jnp.searchsorted, which meshes with explicit axes do not allow.

    Args:
      ascending: int32 [batch, length].
      targets: int32 [batch, d].

    Returns:
      int32 [batch, d].
    """
    length = ascending.shape[1]
    found = zeros_like(targets)
    for bit in reversed(range(length.bit_length())):
        further = found + (1 << bit)
        before = jnp.take_along_axis(ascending, jnp.minimum(further, length) - 1, axis=1)
        found = jnp.where((further <= length) & (before < targets), further, found)
    return found


def uniform_landmarks(
    rng: jax.Array,
    candidates: jax.Array,
    num_landmarks: int,
    positions: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws landmarks uniformly without replacement from the candidate rows of each example.

    All examples of the batch share one random order of the rows, and each takes its first
    candidates in that order. So an example's landmarks depend neither on its position in the batch
    nor on the other examples. Give each example its own rng (jax.vmap) for independent draws.

    Args:
      rng: a jax.random key.
      candidates: bool [batch, rows], the rows that may become landmarks.
      num_landmarks: d, at most the number of rows.
      positions: int32 [rows], ascending: positions of these rows among all rows, if they are split.
      axis_name: the mesh axis over which the rows are split.

    Returns:
      indices int32 [batch, d] and valid bool [batch, d], as in strided_landmarks.
    """
    rows = candidates.shape[1]
    positions = jnp.arange(rows, dtype=jnp.int32) if positions is None else positions
    bits = random_bits(rng, positions.astype(jnp.uint32))[0]
    preference = (bits >> 8).astype(jnp.float32)  # exact: 24 bits
    # Ties go to the first row, both here and in the sort below.
    preference, indices = jax.lax.top_k(
        jnp.where(candidates, preference, -1.0), min(num_landmarks, rows)
    )
    if axis_name is None:
        return indices, preference >= 0
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
    all_preferences = gather(preference)
    slots = jnp.broadcast_to(
        jnp.arange(all_preferences.shape[1], dtype=jnp.int32), all_preferences.shape
    )
    ordered, _, slots = jax.lax.sort(
        (-all_preferences, gather(positions[indices]), slots), dimension=1, num_keys=2
    )
    owner, slot = jnp.divmod(slots[:, :num_landmarks], indices.shape[1])
    here = (owner == shards.shard_index(axis_name)) & (ordered[:, :num_landmarks] <= 0)
    return jnp.take_along_axis(indices, slot, axis=1), here


def segment_means(
    rows: jax.Array,
    candidates: jax.Array,
    num_landmarks: int,
    num_segments: jax.Array,
    running_counts: jax.Array | None = None,
    counts: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes means of equal runs of consecutive candidate rows (Xiong et al., 2021, section 3.2).

    Args:
      rows: [batch, rows, heads, head_dim], finite everywhere.
      candidates: bool [batch, rows], the rows that count.
      num_landmarks: d, the maximum number of segments.
      num_segments: int [batch], the number of segments of each example, at most d and at most its
        number of candidates. The lengths of the segments differ by at most one.
      running_counts: int32 [batch, rows], from shards.running_counts, if the rows are split.
      counts: int32 [batch], the number of all candidates, likewise.
      axis_name: the mesh axis over which the rows are split.

    Returns:
      [batch, d, heads, head_dim]; zeros beyond num_segments.
    """
    if running_counts is None or counts is None:
        running_counts, counts = shards.running_counts([candidates], None)
    counts = jnp.maximum(counts, 1)[:, None]
    # Unsigned, so that the product may be nearly 2**32: 128 segments of 16 million queries and as
    # many keys.
    ranks = jnp.maximum(running_counts - 1, 0).astype(jnp.uint32)
    segments = ranks * num_segments[:, None].astype(jnp.uint32) // counts.astype(jnp.uint32)
    segments = segments.astype(jnp.int32)

    def sums(x: jax.Array) -> jax.Array:
        def add(x: jax.Array, segments: jax.Array) -> jax.Array:
            missing = [(0, max(0, num_landmarks - len(x)))] + [(0, 0)] * (x.ndim - 1)
            zeros = zeros_like(jnp.pad(x, missing)[:num_landmarks])
            return zeros.at[segments].add(x, indices_are_sorted=True)

        return shards.psum(jax.vmap(add)(x, segments), axis_name)

    total = sums(jnp.where(candidates[:, :, None, None], rows, 0))
    size = sums(candidates.astype(rows.dtype))[:, :, None, None]
    return total / jnp.maximum(size, 1)


def kmeans_landmarks(
    rng: jax.Array, rows: jax.Array, candidates: jax.Array, num_landmarks: int
) -> tuple[jax.Array, jax.Array]:
    """Draws the seeds of k-means++ (Arthur and Vassilvitskii, 2007).

    Each landmark is a candidate drawn with probability proportional to its squared distance, over
    all heads, from the nearest of the landmarks drawn before.

    Args:
      rng: a jax.random key.
      rows: float32 [batch, rows, heads, head_dim], finite everywhere.
      candidates: bool [batch, rows], the rows that may become landmarks.
      num_landmarks: d, the number of landmarks of each example.

    Returns:
      indices int32 [batch, d] and valid bool [batch, d]; entries beyond the number of distinct
      candidates are invalid.
    """
    uniforms = jax.random.uniform(rng, (num_landmarks,), jnp.float32)

    def one(rows: jax.Array, candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = rows.reshape(rows.shape[0], -1)

        def step(distances: jax.Array, uniform: jax.Array) -> tuple[jax.Array, tuple]:
            cumulative = jnp.cumsum(distances)
            # The product may round up to the total, and the search would then find no row.
            at = jnp.minimum(uniform * cumulative[-1], jnp.nextafter(cumulative[-1], 0))
            index = jnp.searchsorted(cumulative, at, side="right").astype(jnp.int32)
            index = jnp.minimum(index, len(flat) - 1)
            valid = distances[index] > 0
            new = ((flat - flat[index][None]) ** 2).sum(axis=1)
            return jnp.where(valid, jnp.minimum(distances, new), distances), (index, valid)

        # Before the first landmark all candidates are equally far, farther than any two rows are.
        farthest = 1 + 4 * (flat**2).sum(axis=1).max()
        return jax.lax.scan(step, jnp.where(candidates, farthest, 0), uniforms)[1]

    return jax.vmap(one)(rows, candidates)


def leverage_landmarks(
    rng: jax.Array,
    rows: jax.Array,
    candidates: jax.Array,
    num_landmarks: int,
    *,
    scale: jax.Array | float,
    ridge: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Draws landmarks by their ridge leverage scores (Musco and Musco, 2017, algorithm 2).

    The score of row i of the kernel matrix K is (K (K + ridge I)^-1)_ii. It measures the
    information in the row that the other rows do not have. Computing it requires all of K. The
    recursive scheme instead takes a random half of the rows, chooses a weighted sample S of that
    half in the same way, estimates

        l_i = (K - K S (S^T K S + ridge I)^-1 S^T K)_ii / ridge

    from S alone, and samples by l. Over all levels, from the smallest part to all rows, this costs
    as much as two kernel matrices of rows x d, and the eigenvalues of a d x d matrix per halving.

    As in algorithm 3, which has a given sample size, the ridge grows if d is too small for it: to
    the sum of the eigenvalues beyond the k-th, divided by k, with k = d / (4 log d) and the
    eigenvalues estimated by those of the weighted sample. Otherwise each of many small directions
    would get so little that a large one is missed. Two things differ from the paper: a sample is
    drawn without replacement, with exactly d rows, and the scores are summed over the heads.

    Args:
      rng: a jax.random key.
      rows: float32 [batch, rows, heads, head_dim], finite everywhere.
      candidates: bool [batch, rows], the rows that may become landmarks.
      num_landmarks: d, at most rows.
      scale: the Gaussian kernel's inverse squared width.
      ridge: the minimum ridge, which is added to the kernel matrix's diagonal; positive.

    Returns:
      indices int32 [batch, d] and valid bool [batch, d], as in strided_landmarks.
    """
    num_rows = rows.shape[1]
    top = min(math.ceil(num_landmarks / (4 * math.log(max(num_landmarks, 2)))), num_landmarks)
    num_levels = max(0, math.ceil(math.log2(num_rows / num_landmarks)))
    sizes = [-(-num_rows // 2**level) for level in range(num_levels, -1, -1)]
    order_key, *level_keys = jax.random.split(rng, len(sizes))
    preference = jax.random.uniform(order_key, (num_rows,), jnp.float32)
    noises = [
        jax.random.gumbel(key, (size,), jnp.float32)
        for key, size in zip(level_keys, sizes[1:], strict=True)
    ]

    def one(rows: jax.Array, candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
        order = jnp.argsort(jnp.where(candidates, preference, jnp.float32(2))).astype(jnp.int32)
        x, real = rows[order], candidates[order]
        # In the smallest part every row is in the sample, with probability 1.
        sample = jnp.minimum(jnp.arange(num_landmarks, dtype=jnp.int32), num_rows - 1)
        valid = real[sample] & (jnp.arange(num_landmarks) < sizes[0])
        probability = jnp.ones(num_landmarks, jnp.float32)
        for size, noise in zip(sizes[1:], noises, strict=True):
            chosen = x[sample]
            both = (valid[:, None] & valid[None, :])[None]
            within = jnp.where(both, gaussian_scores(chosen[None], chosen[None], scale)[0], 0)
            weight = jnp.where(valid, probability, 1.0) ** -0.5
            eigenvalues = jnp.linalg.eigvalsh(
                weight[None, :, None] * within * weight[None, None]
            )  # ascending
            tail = eigenvalues[:, : num_landmarks - top].sum(axis=1) / top
            ridges = jnp.maximum(tail, ridge)[:, None, None]  # one per head
            diagonal = jnp.where(valid[None, None], ridges * probability[None, None], 1.0)
            within += jnp.eye(num_landmarks, dtype=jnp.float32)[None] * diagonal
            across = jnp.where(
                valid[None, None], gaussian_scores(x[None, :size], chosen[None], scale)[0], 0
            )
            root = jnp.linalg.cholesky(within)  # [heads, d, d]
            half = jax.lax.linalg.triangular_solve(
                root, across, left_side=False, lower=True, transpose_a=True
            )
            scores = ((1 - (half**2).sum(axis=-1)) / ridges[:, 0]).sum(axis=0)
            scores = jnp.where(real[:size], jnp.maximum(scores, 1e-6), 0)
            perturbed = jnp.where(real[:size], jnp.log(jnp.maximum(scores, 1e-6)) + noise, -jnp.inf)
            perturbed, sample = jax.lax.top_k(perturbed, num_landmarks)
            valid = perturbed > -jnp.inf
            probability = jnp.minimum(1.0, num_landmarks * scores / scores.sum())[sample]
        return order[sample], valid

    return jax.vmap(one)(rows, candidates)
