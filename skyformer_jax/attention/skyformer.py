"""Skyformer: Kernelized Attention by a Nystrom method (Chen et al., 2021, section 4.2).

With d landmarks L drawn from the rows of [Q; K], and M = G(L, L) + gamma I,

    out = G(Q, L) M^-1 (G(L, K) V),

which takes time linear in the length. G(Q, K) alone is not positive semi-definite, but the kernel
matrix of queries and keys together is; completing it in this way makes the Nystrom method sound.
"""

import functools

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import (
    attention_function,
    on_automatic_axes,
    spec_of,
)
from skyformer_jax.attention.convolution import conv_kernel_spec, convolve_values
from skyformer_jax.attention.gaussian import gaussian_attention, gaussian_scores
from skyformer_jax.attention.inputs import (
    check_at_least,
    check_causal,
    check_not_negative,
    hide,
    hide_masked,
    masks_or_all,
)
from skyformer_jax.attention.inverses import matmul, schulz_inverse
from skyformer_jax.attention.landmark_choice import LANDMARKS, find_landmarks
from skyformer_jax.attention.row_sums import over_row_sums, with_ones
from skyformer_jax.attention.skyformer_causal import (
    LEAST_ROW_SUM,
    causal_skyformer,
    initial_state,
)
from skyformer_jax.attention.variables import VariableSpec

INVERSES = ("schulz", "cholesky")
_LEARNED = "learned"  # an option of the layers, which pass this function the array


def check_skyformer_options(
    landmarks: str | jax.Array,
    num_landmarks: int,
    scale: jax.Array | float,
    gamma: jax.Array | float,
    inverse: str,
    num_iterations: int,
) -> None:
    """Raises an error for an invalid option; values of traced numbers are not checked."""
    if inverse not in INVERSES:
        raise ValueError(f"inverse must be one of {', '.join(INVERSES)}; got {inverse!r}")
    if isinstance(landmarks, str) and landmarks == _LEARNED:
        raise ValueError(
            'landmarks="learned" is an option of the layers, which keep the landmarks; pass the '
            "function an array [num_landmarks, heads, head_dim]"
        )
    if isinstance(landmarks, str) and landmarks not in LANDMARKS:
        raise ValueError(
            f"landmarks must be one of {', '.join(LANDMARKS)}, {_LEARNED} in a layer, or an array; "
            f"got {landmarks!r}"
        )
    check_at_least(1, num_landmarks=num_landmarks, num_iterations=num_iterations)
    check_not_negative(scale=scale, gamma=gamma)
    drawn = landmarks if isinstance(landmarks, str) else ""
    if drawn == "leverage" and not isinstance(gamma, jax.core.Tracer) and gamma == 0:
        raise ValueError(
            'landmarks="leverage" needs a gamma above 0, the minimum ridge of its scores'
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
    """Skyformer attention: approximates kernelized_attention in time linear in the length.

    out = G(Q, L) (G(L, L) + gamma I)^-1 G(L, K) V (Chen et al., 2021, equation 6). With all real
    rows as landmarks and gamma -> 0 it equals kernelized_attention.

    The approximation is good if every query and key has landmarks within a few times scale**-0.5.
    Otherwise it loses mass: with 128 landmarks, 1,024 rows and 32 normal features, the relative
    error is 0.01 at a standard deviation of 0.25, 0.13 at 1/sqrt(3), with which this package's
    layers start, and 0.66 at 1. nystrom_residual measures this loss; docs/skyformer.md has the
    table.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: a jax.random key to draw the landmarks with; None makes the choice deterministic.
      scale: the kernel's inverse squared width; None means head_dim**-0.5.
      num_landmarks: d, the number of landmarks of an example, which its heads share. If it exceeds
        the number of rows, all rows are landmarks.
      landmarks: how landmarks are chosen among the real rows of [query; key]:

        - "uniform": drawn uniformly; the same as "strided" if rng is None.
        - "strided": evenly spaced over the positions.
        - "segment_means": means of d equal runs of positions (Xiong et al., 2021).
        - "kmeans++": the seeds of k-means++, far from each other; a sequential loop of d steps.
        - "leverage": drawn by ridge leverage scores (Musco and Musco, 2017), the paper's next
          step; costs two more kernel matrices of rows x d and the eigenvalues of some d x d
          matrices.

        "kmeans++" and "leverage" use a fixed key if rng is None. The draws of "uniform" and
        "leverage" depend on the padded length.

        It can also be an array [num_landmarks, heads, head_dim], the landmarks of all examples,
        which then do not depend on the sequence. With landmarks="learned" a layer learns this
        array.
      landmark_indices: int [batch, d], rows of [query; key] (0..q_length-1 are queries) to use as
        landmarks instead of choosing num_landmarks of them. Indices of masked rows and indices out
        of range are ignored.
      query_mask: bool [batch, q_length], the queries that may become landmarks; None means
        `mask` where q_length == kv_length (self-attention), otherwise all. Other queries affect
        only their own output.
      gamma: regularisation of the landmarks' kernel matrix.
      inverse: "schulz" (matrix products only) or "cholesky" (exact to rounding).
      num_iterations: number of Schulz iterations.
      normalize: divides each row by its sum, approximated in the same way, so that the output
        does not grow with the number of keys near a query. A sum is raised to a hundredth of the
        sum of its terms' absolute values if it is below, as it may be where no landmark is near.
      conv_kernel: float [size, heads] or [size, heads, head_dim], size odd; adds the convolution
        of the values (0 at padding) with it, for self-attention only (Xiong et al., 2021).
      is_causal: query i attends to keys 0..i only. It needs an array of landmarks, because
        landmarks from a sequence's own rows would depend on later positions. See docs/causal.md.
      segment_ids: int [batch, length], for causal attention: positions attend only to their own
        segment. The positions of a segment must be consecutive.
      implementation: how the two Gaussian passes are computed: "auto", "dense", "chunked" or
        "pallas"; see gaussian.gaussian_attention.
      axis_name: name of a mesh axis, within jax.shard_map. Each device then holds a run of the
        sequence, of the same length, of query, key, value and the masks. Only the landmarks, their
        context of d x head_dim and, with conv_kernel, the values at the ends of each run cross
        devices, whatever the length. num_landmarks and landmark_indices refer to the whole
        sequence; landmarks must be "uniform", "strided" or "segment_means".

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
    if is_causal or segment_ids is not None:
        if landmark_indices is not None or isinstance(landmarks, str):
            raise ValueError(
                "skyformer with is_causal or segment_ids needs landmarks that do not depend on the "
                'sequence: landmarks="learned" in a layer, or an array [num_landmarks, heads, '
                "head_dim]; those drawn from its rows would tell of later positions"
            )
        check_causal("skyformer", query, key, is_causal, segment_ids)
        state = initial_state(
            *(len(query), query.shape[2], value.shape[-1], len(landmarks)),
            normalize=normalize,
            conv_size=0 if conv_kernel is None else len(conv_kernel),
        )
        attend = functools.partial(
            causal_skyformer,
            inverse=inverse,
            num_iterations=num_iterations,
            normalize=normalize,
            axis_name=axis_name,
        )
        out = on_automatic_axes(
            lambda *x: attend(*x)[0],
            spec_of(query),
            *(query, key, value, mask, landmarks, conv_kernel, segment_ids, state, scale, gamma),
        )
        return out.astype(dtype)

    batch_axes, _, head_axes, _ = spec_of(query)
    specs = [(batch_axes, None, head_axes, None), (batch_axes, None)]
    find = functools.partial(find_landmarks, num_landmarks=num_landmarks, axis_name=axis_name)
    masks = masks_or_all(query, key, mask, query_mask)
    arrays = (query, key, masks, rng, landmark_indices, scale, gamma, landmarks)
    points, valid = on_automatic_axes(find, specs, *arrays)
    passes = functools.partial(gaussian_attention, scale=scale, implementation=implementation)
    values = with_ones(value, mask) if normalize else value
    context = shards.psum(passes(points, key, values), axis_name)
    solve = functools.partial(solve_landmarks, inverse=inverse, num_iterations=num_iterations)
    weights = on_automatic_axes(solve, specs[0], points, valid, context, scale, gamma)
    if normalize:
        size = jnp.abs(jax.lax.stop_gradient(weights[..., -1:]))
        sums = passes(query, points, jnp.concatenate([weights, size], axis=-1))
        out = over_row_sums(sums[..., :-1], LEAST_ROW_SUM * sums[..., -1:])
    else:
        out = passes(query, points, weights)
    if conv_kernel is not None:
        if query.shape[1] != key.shape[1]:
            raise ValueError("skyformer's convolution needs q_length == kv_length")
        convolve = functools.partial(convolve_values, axis_name=axis_name)
        kernel = conv_kernel.astype(jnp.float32)
        out += on_automatic_axes(convolve, spec_of(out), value.astype(jnp.float32), kernel)
    return out.astype(dtype)


def skyformer_variables(
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    kv_length: int | None,
    landmarks: str | jax.Array = "uniform",
    num_landmarks: int = 128,
    conv_size: int = 0,
) -> dict[str, VariableSpec]:
    """Describes what a layer learns: the convolution's kernel and the landmarks.

    The kernel is [conv_size, heads, value_dim]; there is none if conv_size is 0. Landmarks,
    [num_landmarks, heads, head_dim], are learned if landmarks="learned". They start as normal noise
    with the variance that queries and keys have in a new layer (dense_inits).
    """
    del kv_length
    found = conv_kernel_spec(conv_size, num_heads, value_dim)
    if isinstance(landmarks, str) and landmarks == _LEARNED:
        check_at_least(1, num_landmarks=num_landmarks)
        init = jax.nn.initializers.normal(3**-0.5, jnp.float32)
        shape = (num_landmarks, num_heads, head_dim)
        found["landmarks"] = VariableSpec(shape, init, trained=True)
    return found


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
    """Computes M^-1 rows for M = G(points, points) + gamma I.

    Landmarks that are not valid are removed from M, which gets a 1 on its diagonal there, and from
    rows, so that they contribute exactly nothing.

    Args:
      points: float32 [batch, d, heads, head_dim].
      valid: bool [batch, d].
      rows: float32 [batch, d, heads, any].
      scale: the kernel's inverse squared width.
      gamma: regularisation of M.
      inverse: one of INVERSES.
      num_iterations: number of Schulz iterations.

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
