"""Causal Skyformer: a prefix sum of features, with landmarks that do not depend on the sequence.

Skyformer's kernel G(q, L) M^-1 G(L, k) is a product of the features phi(q) = M^-1 G(L, q) and
psi(k) = G(L, k). So its causal form is that of prefix_sums.py, and its state is [d, value_dim] per
head. Landmarks drawn from the rows of a sequence would make earlier positions depend on later ones.
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.convolution import convolve_values
from skyformer_jax.attention.gaussian import gaussian_scores
from skyformer_jax.attention.inverses import matmul, schulz_inverse
from skyformer_jax.attention.prefix_sums import (
    Features,
    State,
    empty_state,
    prefix_attention,
)
from skyformer_jax.attention.row_sums import over_row_sums, with_ones

# The minimum sum of a row, as a fraction of the sum of its terms' absolute values.
LEAST_ROW_SUM = 1e-2


def kernel_features(
    landmarks: jax.Array,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    *,
    inverse: str,
    num_iterations: int,
) -> tuple[Features, Features]:
    """Returns the feature functions phi and psi of Skyformer's kernel.

    Args:
      landmarks: [d, heads, head_dim], L.
      scale: the kernel's inverse squared width.
      gamma: regularisation of M = G(L, L) + gamma I.
      inverse: "schulz" or "cholesky".
      num_iterations: number of Schulz iterations.

    Returns:
      phi and psi, functions from float32 [batch, rows, heads, head_dim] to [batch, heads, rows, d].
    """
    points = landmarks.astype(jnp.float32)[None]
    eye = jnp.eye(len(landmarks), dtype=jnp.float32)
    m = gaussian_scores(points, points, scale)[0] + gamma * eye[None]
    if inverse == "schulz":
        solved = schulz_inverse(m, num_iterations)
    else:
        factor = jax.scipy.linalg.cho_factor(m)
        solved = jax.scipy.linalg.cho_solve(factor, jnp.broadcast_to(eye, m.shape))

    def of_keys(rows: jax.Array) -> jax.Array:
        return gaussian_scores(
            rows, jnp.broadcast_to(points, (len(rows), *points.shape[1:])), scale
        )

    def of_queries(rows: jax.Array) -> jax.Array:
        return matmul(of_keys(rows), solved[None])

    return of_queries, of_keys


def causal_skyformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    landmarks: jax.Array,
    conv_kernel: jax.Array | None,
    segment_ids: jax.Array | None,
    state: tuple[State, jax.Array],
    scale: jax.Array | float,
    gamma: jax.Array | float,
    *,
    inverse: str,
    num_iterations: int,
    normalize: bool,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[State, jax.Array]]:
    """Computes causal Skyformer attention for the positions after those of a state.

    Args:
      query: [batch, length, heads, head_dim].
      key: likewise, 0 at masked positions.
      value: [batch, length, heads, value_dim], likewise.
      mask: bool [batch, length], or None.
      landmarks: [d, heads, head_dim].
      conv_kernel: as in skyformer_attention; the last of its `size` rows applies to the position
        itself, the others to the positions before it.
      segment_ids: as in skyformer_attention.
      state: from initial_state or an earlier call.
      scale: as in skyformer_attention.
      gamma: likewise.
      inverse: likewise.
      num_iterations: likewise.
      normalize: likewise.
      axis_name: likewise.

    Returns:
      float32 [batch, length, heads, value_dim], and the state after the last position.
    """
    of_queries, of_keys = kernel_features(
        landmarks, scale, gamma, inverse=inverse, num_iterations=num_iterations
    )
    sums, recent = state
    out, sums = prefix_attention(
        of_queries,
        of_keys,
        query,
        key,
        with_ones(value, mask) if normalize else value,
        state=sums,
        segment_ids=segment_ids,
        bounds=normalize,
        axis_name=axis_name,
    )
    if normalize:
        out = over_row_sums(out[..., :-1], LEAST_ROW_SUM * out[..., -1:])
    if conv_kernel is not None:
        value = value.astype(jnp.float32)
        out += convolve_values(
            value,
            conv_kernel.astype(jnp.float32),
            axis_name,
            segment_ids=segment_ids,
            is_causal=True,
            before=recent if axis_name is None else None,
        )
        recent = jnp.concatenate([recent, value], axis=1)[:, value.shape[1] :]
    return out, (sums, recent)


def initial_state(
    batch: int, heads: int, value_dim: int, num_landmarks: int, *, normalize: bool, conv_size: int
) -> tuple[State, jax.Array]:
    """Returns the state before the first position: prefix sums, and values for the convolution."""
    sums = empty_state(batch, heads, num_landmarks, value_dim + normalize)
    return sums, jnp.zeros((batch, max(conv_size - 1, 0), heads, value_dim), jnp.float32)
