"""Skyformer's five ways to choose landmarks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import inputs, masks

from skyformer_jax.attention import kernelized_attention, landmarks, skyformer_attention
from skyformer_jax.attention.inputs import _take_flat_rows, _take_rows, take_rows
from skyformer_jax.attention.landmark_choice import LANDMARKS

all_kinds = pytest.mark.parametrize("kind", LANDMARKS)


@functools.cache
def jitted(kind, num_landmarks=8, inverse="schulz"):
    return jax.jit(
        functools.partial(
            skyformer_attention, landmarks=kind, num_landmarks=num_landmarks, inverse=inverse
        )
    )


def clustered(length, *, num_clusters=16, size=6, spread=0.1, head_dim=16):
    """Queries and keys of one large and many small, tight clusters in random order; values."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(num_clusters, head_dim))
    labels = np.maximum(np.arange(length) - (length - (num_clusters - 1) * size), -1) // size + 1
    rows = [
        centres[rng.permutation(labels)] + spread * rng.normal(size=(length, head_dim))
        for _ in range(2)
    ]
    value = rng.normal(size=(length, head_dim))
    return tuple(jnp.asarray(x, jnp.float32)[None, :, None] for x in (*rows, value))


@pytest.mark.slow
def test_leverage_has_a_smaller_spectral_error_than_uniform_on_clusters():
    """Musco and Musco (2017): uniform sampling misses small clusters, leverage scores do not."""
    q, k, v = clustered(512)
    exact = kernelized_attention(q, k, v)[0, :, 0]
    errors = {}
    for kind in ("uniform", "leverage"):
        draw = jax.vmap(lambda rng, kind=kind: jitted(kind, 128, "cholesky")(q, k, v, rng=rng))
        outs = draw(jax.random.split(jax.random.key(0), 10))[:, 0, :, 0]
        norms = np.linalg.norm(np.asarray(outs - exact), ord=2, axis=(1, 2))
        errors[kind] = norms / np.linalg.norm(np.asarray(exact), 2)
    assert errors["uniform"].mean() > 0.005  # otherwise there is nothing to improve
    assert errors["leverage"].mean() < 0.7 * errors["uniform"].mean()
    assert np.median(errors["leverage"]) < 0.7 * np.median(errors["uniform"])


@pytest.mark.slow
def test_leverage_draws_by_the_exact_scores():
    """Compares the rows' frequencies with scores from the full float64 kernel matrix."""
    q, k, _ = clustered(96, num_clusters=5, size=4)
    rows = jnp.concatenate([q, k], axis=1)
    candidates = jnp.ones(rows.shape[:2], bool)
    scale, ridge = 0.25, 5.0  # above the ridge that 24 landmarks need
    draw = jax.jit(
        jax.vmap(
            lambda rng: landmarks.leverage_landmarks(
                rng, rows, candidates, 24, scale=scale, ridge=ridge
            )[0][0]
        )
    )
    chosen = np.asarray(draw(jax.random.split(jax.random.key(0), 150)))
    frequency = np.bincount(chosen.ravel(), minlength=192) / 150
    x = np.asarray(rows, np.float64)[0, :, 0]
    kernel = np.exp(-scale / 2 * ((x[:, None] - x[None]) ** 2).sum(-1))
    scores = np.diag(kernel @ np.linalg.inv(kernel + ridge * np.eye(192)))
    large = np.argsort(scores)[-32:]  # the rows of the four small clusters
    # Without replacement, likely rows are drawn slightly less often than in proportion to scores.
    expected = 24 * scores / scores.sum()
    assert 0.7 < frequency[large].mean() / expected[large].mean() < 1.1
    others = np.setdiff1d(np.arange(192), large)
    assert 0.8 < frequency[others].mean() / expected[others].mean() < 1.3


@all_kinds
def test_padding_is_invisible(kind):
    q, k, v = inputs(40, 40)
    mask = masks(3, 40)
    real = mask[:, :, None, None]
    for rng in (None, jax.random.key(1)):
        clean = jitted(kind)(q, k, v, mask=mask, rng=rng)
        junk = (jnp.where(real, x, jnp.nan) for x in (q, k, v))
        dirty = jitted(kind)(*junk, mask=mask, rng=rng)
        np.testing.assert_array_equal(np.where(real, dirty, 0), np.where(real, clean, 0))
        assert np.isfinite(np.where(real, clean, 0)).all()
        alone = jitted(kind)(q[:1], k[:1], v[:1], mask=mask[:1], rng=rng)
        np.testing.assert_allclose(alone, clean[:1], rtol=1e-4, atol=1e-4)


@all_kinds
def test_error_falls_as_landmarks_grow(kind):
    q, k, v = inputs(64, 64, batch=1)
    exact = kernelized_attention(q, k, v)
    norms = [
        float(jnp.linalg.norm(jitted(kind, d, "cholesky")(q, k, v) - exact)) for d in (4, 16, 128)
    ]
    # Segments mix adjacent queries and keys, so their means stay coarse.
    assert norms[0] > norms[1] > norms[2]


@all_kinds
def test_randomness_and_gradients(kind):
    q, k, v = inputs(50, 50, batch=2)
    one, two = (jitted(kind)(q, k, v, rng=jax.random.key(i)) for i in (1, 2))
    assert np.any(one != two) == (kind not in ("strided", "segment_means"))
    np.testing.assert_array_equal(jitted(kind)(q, k, v), jitted(kind)(q, k, v))
    gradients = jax.jit(jax.grad(lambda *x: jitted(kind)(*x).sum(), argnums=(0, 1, 2)))(q, k, v)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.any(gradient)


@pytest.mark.parametrize("kind", ["kmeans++", "leverage"])
@pytest.mark.parametrize("num_landmarks", [1, 7, 30])
def test_chosen_rows_are_distinct_and_real(kind, num_landmarks):
    rng = np.random.default_rng(num_landmarks)
    candidates = rng.random((4, 61)) < 0.7
    candidates[0], candidates[3] = True, False
    candidates[2] = np.arange(61) < 5
    rows = jnp.asarray(rng.normal(size=(4, 61, 2, 8)), jnp.float32)
    if kind == "leverage":
        choose = functools.partial(landmarks.leverage_landmarks, scale=0.35, ridge=0.1)
    else:
        choose = landmarks.kmeans_landmarks
    chosen = jax.jit(functools.partial(choose, num_landmarks=num_landmarks))(
        jax.random.key(0), rows, jnp.asarray(candidates)
    )
    for row, (indices, valid) in enumerate(zip(*map(np.asarray, chosen), strict=True)):
        assert valid.sum() == min(candidates[row].sum(), num_landmarks)
        assert len(set(indices[valid])) == valid.sum()
        assert candidates[row][indices[valid]].all()


def test_kmeans_seeds_visit_every_cluster():
    q, k, _ = clustered(200, num_clusters=10, spread=0.01)
    rows = jnp.concatenate([q, k], axis=1)
    candidates = jnp.ones(rows.shape[:2], bool)
    indices, valid = landmarks.kmeans_landmarks(jax.random.key(0), rows, candidates, 10)
    seeds = np.asarray(rows)[0, np.asarray(indices)[0], 0]
    distances = np.linalg.norm(seeds[:, None] - seeds[None], axis=-1)
    assert valid.all()
    assert (distances + 10 * np.eye(10)).min() > 1  # no two seeds share a cluster
    # Three distinct rows give three seeds, even if more are requested.
    few = jnp.tile(rows[:, :3], (1, 5, 1, 1))
    _, valid = landmarks.kmeans_landmarks(jax.random.key(0), few, jnp.ones((1, 15), bool), 6)
    assert valid.sum() == 3


def test_segment_means_are_means_of_equal_runs():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 23, 2, 4)).astype(np.float32)
    candidates = np.stack([np.ones(23, bool), rng.random(23) < 0.5])
    counts = np.array([6, 4])
    means = landmarks.segment_means(jnp.asarray(rows), jnp.asarray(candidates), 6, counts)
    for b in range(2):
        real = rows[b, candidates[b]]
        for i in range(6):
            run = real[np.arange(len(real)) * counts[b] // len(real) == i]
            expected = run.mean(axis=0) if len(run) else np.zeros((2, 4))
            np.testing.assert_allclose(means[b, i], expected, rtol=1e-5, atol=1e-6)


def test_unknown_kind_and_missing_ridge_are_refused():
    with pytest.raises(ValueError, match="uniform, strided, segment_means"):
        skyformer_attention(*inputs(4, 4), landmarks="random")
    with pytest.raises(ValueError, match="gamma above 0"):
        skyformer_attention(*inputs(4, 4), landmarks="leverage", gamma=0.0)


def test_all_platforms_gather_the_same_rows_and_gradients():
    rows = jax.random.normal(jax.random.key(0), (3, 20, 2, 4))
    indices = jax.random.randint(jax.random.key(1), (3, 7), 0, 20)
    weights = jnp.round(8 * jax.random.normal(jax.random.key(2), (3, 7, 2, 4)))  # sums are exact

    def values_and_gradient(take):
        out, pull = jax.vjp(lambda rows: take(rows, indices), rows)
        return out, *pull(weights)

    expected_rows = np.take_along_axis(np.asarray(rows), np.asarray(indices)[..., None, None], 1)
    expected = np.zeros(rows.shape, np.float32)
    for example, row in np.ndindex(indices.shape):
        expected[example, indices[example, row]] += weights[example, row]
    for take in (_take_rows, _take_flat_rows, take_rows):
        taken, gradient = values_and_gradient(take)
        np.testing.assert_array_equal(taken, expected_rows)
        np.testing.assert_array_equal(gradient, expected)
