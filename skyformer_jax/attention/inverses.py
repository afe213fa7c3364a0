"""Inverses of small matrices by matrix products alone, which accelerators compute fastest."""

import functools

import jax
import jax.numpy as jnp

from skyformer_jax.attention.inputs import zeros_like

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def identity_like(matrix: jax.Array) -> jax.Array:
    """Returns identity matrices with the shape [..., d, d], dtype and sharding of `matrix`."""
    eye = jnp.eye(matrix.shape[-1], dtype=bool)
    return jnp.where(jnp.expand_dims(eye, range(matrix.ndim - 2)), 1, zeros_like(matrix))


def razavi_iterations(matrix: jax.Array, start: jax.Array, num_iterations: int) -> jax.Array:
    """Iterates the third-order scheme of Razavi et al. (2014) for the (pseudo-)inverse of A.

        Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

    Args:
      matrix: A, float32 [..., d, d].
      start: the first Z, of the same shape.
      num_iterations: steps of four matrix products each.

    Returns:
      Z, float32 [..., d, d].
    """
    eye = identity_like(matrix)
    z = start
    for _ in range(num_iterations):
        az = matmul(matrix, z)
        z = 0.25 * matmul(z, 13 * eye - matmul(az, 15 * eye - matmul(az, 7 * eye - az)))
    return z


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def schulz_inverse(matrix: jax.Array, num_iterations: int = 6) -> jax.Array:
    """Inverts symmetric positive definite matrices with non-negative entries, approximately.

    The matrices are normalised as A = D^-1/2 M D^-1/2 with D = diag(M 1). The eigenvalues of A lie
    in (0, 1], since D^-1 M is a stochastic matrix (Chen et al., 2021, lemma 3). Then
    razavi_iterations start from Z = 2 I. The residual of an eigenvalue a starts at 1 - 2a, inside
    the region of convergence for every a and independent of the other matrices of the batch. An
    error 1 - x in x = a z becomes (1 - x)^3 (1 - x/4), so small x grow 3.25-fold per step.
    Eigenvalues of A below 3.25^-num_iterations are inverted to less than their inverse, which
    damps them.

    The derivative is that of the exact inverse, dZ = -Z dM Z, which needs no stored iterates.

    Args:
      matrix: float32 [..., d, d].
      num_iterations: steps of razavi_iterations.

    Returns:
      float32 [..., d, d].
    """
    root = jax.lax.rsqrt(matrix.sum(axis=-1))
    a = root[..., :, None] * matrix * root[..., None, :]
    z = razavi_iterations(a, 2 * identity_like(matrix), num_iterations)
    return root[..., :, None] * z * root[..., None, :]


@schulz_inverse.defjvp
def _schulz_inverse_jvp(
    num_iterations: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inverse = schulz_inverse(primals[0], num_iterations)
    return inverse, -matmul(inverse, matmul(tangents[0], inverse))
