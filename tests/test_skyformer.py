"""Skyformer against float64, and in its limiting cases."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from test_attention import inputs, masks

from skyformer_jax.attention import kernelized_attention as eager_kernelized_attention
from skyformer_jax.attention import nystrom_residual as eager_nystrom_residual
from skyformer_jax.attention import skyformer_attention as eager_skyformer_attention
from skyformer_jax.attention.inverses import schulz_inverse
from skyformer_jax.attention.landmarks import strided_landmarks, uniform_landmarks

STATIC = ("scale", "num_landmarks", "gamma", "inverse", "num_iterations")
skyformer_attention = jax.jit(
    eager_skyformer_attention, static_argnames=(*STATIC, "normalize", "is_causal")
)
kernelized_attention = jax.jit(eager_kernelized_attention, static_argnames="normalize")
nystrom_residual = jax.jit(eager_nystrom_residual, static_argnames=STATIC)
schulz = jax.jit(schulz_inverse, static_argnums=1)
both_inverses = pytest.mark.parametrize("inverse", ["schulz", "cholesky"])


@both_inverses
@pytest.mark.parametrize("lengths", [(20, 20), (9, 31), (700, 40)])
def test_equals_float64_reference(inverse, lengths):
    q, k, v = inputs(*lengths)
    mask = masks(3, lengths[1])
    rng = np.random.default_rng(0)
    real_rows = [
        np.concatenate([np.arange(lengths[0]), lengths[0] + np.flatnonzero(m)])
        for m in np.asarray(mask)
    ]
    query_mask = np.ones((3, lengths[0]), bool)
    indices = np.stack([rng.choice(rows, 8, replace=False) for rows in real_rows])
    out = skyformer_attention(
        q,
        k,
        v,
        mask=mask,
        query_mask=query_mask,
        landmark_indices=indices,
        inverse=inverse,
        num_iterations=10,
    )
    expected = references.skyformer(q, k, v, indices, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_given_landmarks_equal_float64_reference(normalize):
    """Checks an array of landmarks shared by all examples, with and without normalized rows."""
    q, k, v = inputs(21, 34)
    mask = masks(3, 34)
    landmarks = np.random.default_rng(0).normal(size=(6, 2, 8)).astype(np.float32)
    options = {"landmarks": landmarks, "normalize": normalize, "num_iterations": 10}
    out = skyformer_attention(q, k, v, mask=mask, **options)
    expected = references.skyformer_from(q, k, v, 3 * [landmarks], mask, normalize=normalize)
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="heads and head_dim of query"):
        eager_skyformer_attention(q, k, v, landmarks=landmarks[:, :1])
    with pytest.raises(ValueError, match="option of the layers"):
        eager_skyformer_attention(q, k, v, landmarks="learned")


def test_normalized_rows_are_means_of_the_values():
    """If all values are equal, the output is that value, regardless of the number of keys."""
    q, k, v = inputs(20, 33)
    mask = masks(3, 33)
    same = np.broadcast_to(v[:, :1], v.shape)
    some = mask.any(axis=1)[:, None, None, None]
    expected = np.where(some, np.broadcast_to(v[:, :1], q.shape), 0)
    options = {"landmark_indices": np.tile(np.arange(53), (3, 1)), "inverse": "cholesky"}
    for out in (
        kernelized_attention(q, k, same, mask=mask, normalize=True),
        skyformer_attention(q, k, same, mask=mask, normalize=True, **options),
    ):
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    exact = kernelized_attention(q, k, v, mask=mask, normalize=True)
    np.testing.assert_allclose(
        exact, references.kernelized(q, k, v, mask, normalize=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["kernelized", "skyformer", "causal"])
def test_normalized_rows_have_gradients_where_no_key_is_near(name):
    """Rows with sums of about 1e-22, and their derivatives, agree with float64."""
    points = np.random.default_rng(0).normal(size=(6, 2, 8)).astype(np.float32)
    q, k, v = inputs(20, 20)
    q, points, k = (x / 4 for x in (q + 27, points, k))
    options = {"landmarks": points, "normalize": True, "inverse": "cholesky"}
    functions = {
        "kernelized": functools.partial(kernelized_attention, normalize=True),
        "skyformer": functools.partial(skyformer_attention, **options),
        "causal": functools.partial(skyformer_attention, is_causal=True, **options),
    }

    def reference(q, k):
        if name == "kernelized":
            return references.kernelized(q, k, v, normalize=True)
        ends = range(1, 21) if name == "causal" else [20]
        outs = [
            references.skyformer_from(q, k[:, :j], v[:, :j], 3 * [points], normalize=True)
            for j in ends
        ]
        return np.stack([o[:, i] for i, o in enumerate(outs)], 1) if len(outs) > 1 else outs[0]

    assert references.kernelized(q, k, np.ones_like(v)).max() < 1e-20
    directions = np.random.default_rng(1).normal(size=(2, *q.shape)) / 10
    function = jax.jit(functools.partial(jax.jvp, lambda q, k: functions[name](q, k, v)))
    out, moved = function((q, k), (*directions.astype("f"),))
    np.testing.assert_allclose(out, reference(q, k), rtol=1e-3, atol=1e-3)
    q, k, step = np.asarray(q, np.float64), np.asarray(k, np.float64), 1e-5 * directions
    expected = (reference(q + step[0], k + step[1]) - reference(q - step[0], k - step[1])) / 2e-5
    np.testing.assert_allclose(moved, expected, rtol=2e-3, atol=2e-3)
    gradients = jax.jit(jax.grad(lambda *x: (functions[name](*x) ** 2).sum(), (0, 1, 2)))(
        *map(np.float32, (q, k, v))
    )
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("per_feature", [False, True])
def test_convolution_is_that_of_the_values(per_feature):
    q, k, v = inputs(30, 30)
    mask = masks(3, 30)
    shape = (5, 2, 8) if per_feature else (5, 2)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with_it, without = (
        np.asarray(skyformer_attention(q, k, v, mask=mask, conv_kernel=kernel))
        for kernel in (kernel, None)
    )
    values = np.where(mask[:, :, None, None], v, 0)
    kernels = np.broadcast_to(kernel.reshape(*shape[:2], -1), (5, 2, 8))
    for b, h, p in np.ndindex(3, 2, 8):
        expected = np.convolve(values[b, :, h, p], kernels[::-1, h, p], mode="same")
        np.testing.assert_allclose((with_it - without)[b, :, h, p], expected, atol=1e-4)
    with pytest.raises(ValueError, match="q_length == kv_length"):
        skyformer_attention(q[:, 1:], k, v, conv_kernel=kernel)


@both_inverses
def test_residual_equals_float64_reference(inverse, monkeypatch):
    """Checks the mean over real rows, with grouped key heads and in blocks; 0 without real rows."""
    monkeypatch.setattr(sys.modules[nystrom_residual.__module__], "_ROWS", 16)
    q, k, _ = inputs(20, 17, heads=4)
    mask, query_mask = masks(3, 17), masks(3, 20, seed=2)
    indices = np.array([[0, 20, 3, 25], [1, 21, 4, 23], [5, 6, 7, 8]])
    options = {"gamma": 0.2, "inverse": inverse, "num_iterations": 10, "scale": 0.6}
    found = nystrom_residual(
        q,
        k[:, :, ::2],
        mask,
        query_mask=query_mask,
        landmark_indices=indices,
        **options,
    )
    rows = np.concatenate([q, np.repeat(k[:, :, ::2], 2, axis=2)], axis=1).astype(np.float64)
    real = np.concatenate([query_mask, mask], axis=1)
    expected = np.zeros((3, 4))
    for b, h in np.ndindex(2, 4):
        points = rows[b, [i for i in indices[b] if real[b, i]], h]
        m = references.gaussian_kernel(points, points, 0.6) + 0.2 * np.eye(len(points))
        across = references.gaussian_kernel(rows[b, real[b], h], points, 0.6)
        expected[b, h] = 1 - (across @ np.linalg.inv(m) * across).sum(axis=1).mean()
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_residual_says_how_well_skyformer_approximates():
    """The residual is 0 with all rows as landmarks and, like the error, near 1 for distant rows."""
    q, k, v = inputs(48, 48)
    everything = {"num_landmarks": 96, "gamma": 1e-4, "inverse": "cholesky"}
    assert (nystrom_residual(q, k, **everything) < 1e-3).all()
    residuals, errors = [], []
    for spread in (0.1, 0.5, 1.0, 4.0):
        a, b = spread * q, spread * k
        residuals.append(np.mean(nystrom_residual(a, b, num_landmarks=16)))
        exact = np.asarray(kernelized_attention(a, b, v))
        out = skyformer_attention(a, b, v, num_landmarks=16)
        errors.append(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    assert residuals == sorted(residuals)
    assert errors == sorted(errors)
    assert residuals[0] < 0.05 < 0.7 < residuals[-1]
    assert errors[0] < 0.05 < 0.7 < errors[-1]
    assert nystrom_residual(q[:0], k[:0]).shape == (0, 2)
    assert not nystrom_residual(q, k, np.zeros((3, 48), bool)).any()
    with pytest.raises(ValueError, match="agree in batch and head_dim"):
        nystrom_residual(q, k[..., :4])


@both_inverses
def test_gradients_by_finite_differences_of_the_reference(inverse):
    q, k, v = inputs(12, 15, batch=2, head_dim=4)
    mask = masks(2, 15)
    mask[-1] = True
    indices = np.array([[0, 3, 5, 7, 12], [1, 2, 13, 20, 26]])
    rng = np.random.default_rng(5)
    weights = rng.normal(size=q.shape)

    def loss(q, k, v):
        out = skyformer_attention(q, k, v, mask=mask, landmark_indices=indices, inverse=inverse)
        return (out * weights).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert mask[0, 0]  # row 12 of example 0, a landmark, is a real key
    references.assert_directional_derivatives(
        gradients,
        lambda *args: (references.skyformer(*args, indices, mask) * weights).sum(),
        (q, k, v),
        rng,
        tolerance=2e-3,
    )


@both_inverses
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_error_falls_to_zero_as_landmarks_grow(inverse, masked):
    """With a small gamma and all rows as landmarks, Skyformer is kernelized attention."""
    length = 96
    q, k, v = inputs(length, length, head_dim=16)
    real = masks(3, length) if masked else np.ones((3, length), bool)
    real[-1] = True
    mask = real if masked else None
    exact = np.asarray(kernelized_attention(q, k, v, mask=mask))[real]
    errors = []
    for num_landmarks in (12, 48, 96, 192):
        out = skyformer_attention(
            q,
            k,
            v,
            mask=mask,
            num_landmarks=num_landmarks,
            gamma=1e-4,
            inverse=inverse,
            num_iterations=14,
        )
        errors.append(np.linalg.norm(np.asarray(out)[real] - exact) / np.linalg.norm(exact))
    assert errors[0] > 0.1  # few landmarks must err, otherwise the test shows nothing
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_more_landmarks_than_rows_means_all_rows():
    q, k, v = inputs(10, 7)
    everything = skyformer_attention(q, k, v, num_landmarks=17)
    np.testing.assert_array_equal(skyformer_attention(q, k, v, num_landmarks=500), everything)
    # A padded example has fewer real rows than landmarks, and the invalid ones add nothing.
    mask = masks(3, 7)
    padded = skyformer_attention(q, k, v, mask=mask, num_landmarks=17, inverse="cholesky")
    for i in range(2):
        real = np.flatnonzero(mask[i])
        alone = skyformer_attention(
            q[i : i + 1], k[i : i + 1, real], v[i : i + 1, real], inverse="cholesky"
        )
        np.testing.assert_allclose(padded[i : i + 1], alone, rtol=2e-4, atol=2e-4)


def test_schulz_and_cholesky_agree():
    q, k, v = inputs(300, 300, head_dim=32)
    by_schulz = skyformer_attention(q, k, v)
    by_cholesky = skyformer_attention(q, k, v, inverse="cholesky")
    np.testing.assert_allclose(by_schulz, by_cholesky, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spread", [0.01, 0.5, 1.0, 5.0])
def test_schulz_residual_follows_its_own_bound(spread):
    """The residual stays within the bound that the scalar iteration gives for the eigenvalues."""
    rng = np.random.default_rng(2)
    points = spread * rng.normal(size=(40, 8))
    m = references.gaussian_kernel(points, points, 8**-0.5) + 0.1 * np.eye(40)
    root = m.sum(1) ** -0.5
    smallest = np.linalg.eigvalsh(root[:, None] * m * root)[0]
    for steps in (2, 4, 6, 10):
        z = np.asarray(schulz(np.asarray(m, np.float32), steps), np.float64)
        residual = np.linalg.norm(
            np.eye(40) - (root[:, None] * m * root) @ (z / root[:, None] / root), 2
        )
        x = 2 * np.array([smallest, 1.0])
        for _ in range(steps):
            x = 1 - (1 - x) ** 3 * (1 - x / 4)
        # No eigenvalue in between has a larger residual: the map increases until it first is 1.
        assert residual <= np.abs(1 - x).max() + 2e-4


def test_schulz_does_not_depend_on_batch_mates():
    rng = np.random.default_rng(3)
    small = references.gaussian_kernel(*[0.01 * rng.normal(size=(16, 4))] * 2, 0.5)
    large = references.gaussian_kernel(*[5 * rng.normal(size=(16, 4))] * 2, 0.5)
    batch = np.asarray(np.stack([small, large]) + 0.1 * np.eye(16), np.float32)
    np.testing.assert_allclose(schulz(batch)[1], schulz(batch[1:])[0], rtol=1e-6)


@pytest.mark.parametrize("num_landmarks", [1, 7, 30, 61])
def test_spread_landmarks_are_distinct_real_and_even(num_landmarks):
    rng = np.random.default_rng(num_landmarks)
    candidates = rng.random((5, 61)) < 0.7
    candidates[0] = True
    candidates[4] = False
    find = jax.jit(strided_landmarks, static_argnums=1)
    indices, valid = map(np.asarray, find(candidates, num_landmarks))
    for row in range(5):
        count = candidates[row].sum()
        chosen = indices[row][valid[row]]
        assert len(chosen) == min(count, num_landmarks)
        assert len(set(chosen)) == len(chosen)
        assert candidates[row][chosen].all()
        ranks = np.searchsorted(np.flatnonzero(candidates[row]), chosen)
        if len(chosen) > 1 and count >= num_landmarks:
            gaps = np.diff(ranks)
            assert gaps.max() - gaps.min() <= 1


def test_drawn_landmarks_are_distinct_real_and_uniform():
    candidates = np.arange(20)[None] % 5 != 0
    draw = functools.partial(uniform_landmarks, candidates=candidates, num_landmarks=4)
    draw = jax.jit(jax.vmap(draw))
    indices, valid = draw(jax.random.split(jax.random.key(0), 4000))
    assert valid.all()
    counts = np.bincount(np.asarray(indices).ravel(), minlength=20)
    assert not counts[::5].any()
    expected = 4000 * 4 / 16
    # Without replacement the variance is below the binomial's; allow five of its deviations.
    assert np.abs(counts[counts > 0] - expected).max() < 5 * expected**0.5
    assert all(len(set(row)) == 4 for row in np.asarray(indices)[:, 0])


def test_draws_differ_with_rng_and_average_to_less_error():
    q, k, v = inputs(128, 128, head_dim=8)
    exact = np.asarray(kernelized_attention(q, k, v))
    draws = np.stack(
        [skyformer_attention(q, k, v, num_landmarks=16, rng=jax.random.key(i)) for i in range(20)]
    )
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    error = np.linalg.norm(draws - exact, axis=-1).mean()
    assert np.linalg.norm(draws.mean(0) - exact, axis=-1).mean() < error


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"inverse": "svd"}, "schulz, cholesky"),
        ({"num_landmarks": 0}, "at least 1"),
        ({"gamma": -1.0}, "negative"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        eager_skyformer_attention(*inputs(4, 4), **option)
