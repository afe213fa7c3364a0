"""Skyformer: Kernelized Attention by a Nystrom method (Chen et al., 2021, section 4.2).

With d landmarks L drawn from the rows of [Q; K], and M = G(L, L) + gamma I,

    out = G(Q, L) M^-1 (G(L, K) V),

linear in the length. The kernel matrix of queries and keys together is positive semi-definite,
which G(Q, K) alone is not; that completion is what makes the Nystrom method sound here.
"""

import functools

import jax
import jax.numpy as jnp

from skyformer_jax.attention.gaussian import gaussian_attention, gaussian_scores
from skyformer_jax.attention.inputs import check_and_hide_masked

INVERSES = ("schulz", "cholesky")

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def spread_landmarks(candidates: jax.Array, num_landmarks: int) -> tuple[jax.Array, jax.Array]:
    """Landmarks evenly spread over the candidate rows of each example: no randomness.

    Args:
      candidates: bool [batch, rows], the rows that may become landmarks.
      num_landmarks: d.

    Returns:
      indices int32 [batch, d] and valid bool [batch, d]. An example with c < d candidates has
      them all once, and d - c entries that are not valid.
    """
    counts = candidates.sum(axis=1, dtype=jnp.int32)[:, None]
    slots = jnp.arange(num_landmarks, dtype=jnp.int32)[None, :]
    # The middles of d equal parts of the candidates' ranks, as floor((2i + 1) c / 2d) without its
    # overflow: c // d and c % d stand for c.
    whole, rest = counts // num_landmarks, counts % num_landmarks
    middles = (2 * slots + 1) * whole + (2 * slots + 1) * rest // num_landmarks
    ranks = jnp.where(counts < num_landmarks, slots, middles // 2)
    ordinals = jnp.cumsum(candidates, axis=1, dtype=jnp.int32)  # of each row among the candidates
    indices = jax.vmap(jnp.searchsorted)(ordinals, ranks + 1)
    indices = jnp.minimum(indices, candidates.shape[1] - 1).astype(jnp.int32)
    return indices, slots < counts


def drawn_landmarks(
    rng: jax.Array, candidates: jax.Array, num_landmarks: int
) -> tuple[jax.Array, jax.Array]:
    """Landmarks drawn uniformly without replacement from the candidate rows of each example.

    One order of preference over the rows serves all examples of the batch, each keeping its own
    candidates: so an example's landmarks depend neither on its place in the batch nor on its
    batch mates. Give each example its own rng (jax.vmap) for independent draws.

    Args:
      rng: a jax.random key.
      candidates: bool [batch, rows], the rows that may become landmarks.
      num_landmarks: d, at most rows.

    Returns:
      indices int32 [batch, d] and valid bool [batch, d], as spread_landmarks.
    """
    preference = jax.random.uniform(rng, candidates.shape[1:])
    preference, indices = jax.lax.top_k(jnp.where(candidates, preference, -1.0), num_landmarks)
    return indices, preference >= 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def schulz_inverse(matrix: jax.Array, num_iterations: int = 6) -> jax.Array:
    """Inverse of symmetric positive definite matrices with non-negative entries.

    Normalised as A = D^-1/2 M D^-1/2 with D = diag(M 1), the eigenvalues lie in (0, 1], since
    D^-1 M is a stochastic matrix (Chen et al., 2021, lemma 3). Then the third-order iteration of
    Razavi et al. (2014),

        Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,

    started from Z = 2 I: the residual of an eigenvalue a starts at 1 - 2a, inside the region of
    convergence for all of them, whatever the other matrices of the batch. An error 1 - x in
    x = a z becomes (1 - x)^3 (1 - x/4), so small x grow 3.25-fold a step: eigenvalues of A below
    3.25^-num_iterations are inverted to less than their inverse, which damps them.

    The derivative is that of the inverse itself, dZ = -Z dM Z, which needs no stored iterates.

    Args:
      matrix: float32 [..., d, d].
      num_iterations: steps of three matrix products each.

    Returns:
      float32 [..., d, d].
    """
    root = jax.lax.rsqrt(matrix.sum(axis=-1))
    a = root[..., :, None] * matrix * root[..., None, :]
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    z = jnp.broadcast_to(2 * eye, matrix.shape)
    for _ in range(num_iterations):
        az = _matmul(a, z)
        z = 0.25 * _matmul(z, 13 * eye - _matmul(az, 15 * eye - _matmul(az, 7 * eye - az)))
    return root[..., :, None] * z * root[..., None, :]


@schulz_inverse.defjvp
def _schulz_inverse_jvp(
    num_iterations: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inverse = schulz_inverse(primals[0], num_iterations)
    return inverse, -_matmul(inverse, _matmul(tangents[0], inverse))


def skyformer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: float | None = None,
    num_landmarks: int = 128,
    landmark_indices: jax.Array | None = None,
    query_mask: jax.Array | None = None,
    gamma: float = 0.1,
    inverse: str = "schulz",
    num_iterations: int = 6,
) -> jax.Array:
    """Skyformer attention: kernelized_attention approximated in time linear in the length.

    out = G(Q, L) (G(L, L) + gamma I)^-1 G(L, K) V (Chen et al., 2021, equation 6). With all real
    rows as landmarks and gamma -> 0 it is kernelized_attention exactly.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: a jax.random key to draw the landmarks by; None spreads them evenly over the real rows.
      scale: the kernel's inverse squared width; None means head_dim**-0.5.
      num_landmarks: d, shared by the heads of an example; more than there are rows means all.
      landmark_indices: int [batch, d], rows of [query; key] (0..q_length-1 are queries) to use
        instead of num_landmarks chosen here; those at masked rows count for nothing.
      query_mask: bool [batch, q_length], the queries that may become landmarks; None means
        `mask` where q_length == kv_length (self-attention), otherwise all. No output depends on
        what stands at other queries, but their own.
      gamma: regularisation of the landmarks' kernel matrix.
      inverse: "schulz" (matrix products only) or "cholesky" (exact to rounding).
      num_iterations: of the Schulz iteration.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or an option is out of range.
    """
    if inverse not in INVERSES:
        raise ValueError(f"inverse must be one of {', '.join(INVERSES)}; got {inverse!r}")
    if num_landmarks < 1:
        raise ValueError(f"num_landmarks must be at least 1; got {num_landmarks}")
    if gamma < 0:
        raise ValueError(f"gamma must not be negative; got {gamma}")
    dtype = value.dtype
    key, value = check_and_hide_masked(query, key, value, mask)
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    batch, q_length, _, head_dim = query.shape
    kv_length = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale

    key_mask = jnp.ones((batch, kv_length), bool) if mask is None else mask
    if query_mask is None:
        query_mask = key_mask if q_length == kv_length else jnp.ones((batch, q_length), bool)
    candidates = jnp.concatenate([query_mask, key_mask], axis=1)
    num_landmarks = min(num_landmarks, q_length + kv_length)
    if landmark_indices is not None:
        indices = landmark_indices
        valid = jnp.take_along_axis(candidates, indices, axis=1)
    elif rng is None:
        indices, valid = spread_landmarks(candidates, num_landmarks)
    else:
        indices, valid = drawn_landmarks(rng, candidates, num_landmarks)

    # Landmarks that are not valid are cut out of M (which gets a 1 on its diagonal there) and of
    # the context, so they add exactly nothing.
    rows = jnp.concatenate([query, key], axis=1)
    landmarks = jnp.take_along_axis(rows, indices[:, :, None, None], axis=1)
    landmarks = jnp.where(valid[:, :, None, None], landmarks, 0)
    both_valid = (valid[:, :, None] & valid[:, None, :])[:, None]
    diagonal = jnp.where(valid, gamma, 1.0)[:, None, :, None] * jnp.eye(indices.shape[1])
    m = jnp.where(both_valid, gaussian_scores(landmarks, landmarks, scale), 0) + diagonal
    context = gaussian_attention(landmarks, key, value, scale=scale)
    context = jnp.where(valid[:, :, None, None], context, 0)
    context = jnp.moveaxis(context, 2, 1)  # [batch, heads, d, head_dim], as M's [..., d, d]
    if inverse == "schulz":
        weights = _matmul(schulz_inverse(m, num_iterations), context)
    else:
        weights = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(m), context)
    out = gaussian_attention(query, landmarks, jnp.moveaxis(weights, 1, 2), scale=scale)
    return out.astype(dtype)
