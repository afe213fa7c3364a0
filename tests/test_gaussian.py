"""gaussian_attention: its forms agree with each other and float64, in memory linear in length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_directional_derivatives, gaussian_kernel

from skyformer_jax.attention import (
    gaussian,
    kernelized_attention,
    platforms,
    skyformer_attention,
)
from skyformer_jax.attention.gaussian import gaussian_attention

# One tile, several tiles along one or both sides, and lengths that are no multiple of a tile.
LENGTHS = [(1, 1), (3, 200), (200, 3), (1100, 130), (130, 1100), (300, 300), (2050, 1), (520, 1040)]


def arrays(q_length, kv_length, *, batch=2, heads=2, head_dim=4, seed=0):
    rng = np.random.default_rng(seed)
    lengths = (q_length, kv_length, kv_length, q_length)
    return [jnp.asarray(rng.normal(size=(batch, n, heads, head_dim)), jnp.float32) for n in lengths]


@functools.cache
def value_and_gradients(implementation):
    def loss(query, key, value, scale, weights):
        out = gaussian_attention(query, key, value, scale=scale, implementation=implementation)
        return (out * weights).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


@pytest.fixture
def small_tiles(monkeypatch):
    """Sets tiles of 24 x 16, so that short sequences have many."""
    monkeypatch.setattr(gaussian, "_TILE", {"cpu": (24, 16), "default": (24, 16)})


@pytest.mark.parametrize("lengths", LENGTHS)
def test_forms_agree_in_values_and_gradients(lengths):
    *qkv, weights = arrays(*lengths)
    scale = jnp.float32(0.6)
    (_, dense), dense_gradients = value_and_gradients("dense")(*qkv, scale, weights)
    for other in ("chunked", "auto"):
        (_, out), gradients = value_and_gradients(other)(*qkv, scale, weights)
        np.testing.assert_allclose(out, dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())
        for mine, expected in zip(gradients, dense_gradients, strict=True):
            atol = 1e-6 + 2e-5 * np.abs(expected).max()
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=atol)


def test_values_are_those_of_float64():
    q, k, v, _ = arrays(200, 150)
    out = gaussian_attention(q, k, v, scale=0.6, implementation="chunked")
    expected = [
        gaussian_kernel(*(np.asarray(x[b, :, h], np.float64) for x in (q, k)), 0.6)
        @ np.asarray(v[b, :, h], np.float64)
        for b in range(2)
        for h in range(2)
    ]
    expected = np.swapaxes(np.reshape(expected, (2, 2, 200, 4)), 1, 2)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences(small_tiles):
    q, k, v, weights = arrays(61, 50)

    def reference(q, k, v, scale):
        out = [
            [gaussian_kernel(q[b, :, h], k[b, :, h], scale) @ v[b, :, h] for h in range(2)]
            for b in range(2)
        ]
        return np.swapaxes(np.array(out), 1, 2)

    def loss(q, k, v, scale):
        out = gaussian_attention(q, k, v, scale=scale, implementation="chunked")
        return (out * weights).sum()

    inputs = (q, k, v, jnp.float32(0.6))
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
    assert_directional_derivatives(
        gradients,
        lambda *x: (reference(*x) * np.asarray(weights)).sum(),
        inputs,
        np.random.default_rng(1),
        tolerance=1e-4,
    )


@pytest.mark.slow
def test_second_derivatives(small_tiles):
    """Differentiates the custom gradient rule in reverse mode."""
    *qkv, weights = arrays(40, 33, batch=1)

    def gradient_norm(qkv, implementation):
        def loss(q, k, v):
            out = gaussian_attention(q, k, v, scale=0.6, implementation=implementation)
            return (out * weights).sum()

        return sum((g**2).sum() for g in jax.grad(loss, argnums=(0, 1, 2))(*qkv))

    for mine, expected in zip(
        jax.grad(gradient_norm)(qkv, "chunked"), jax.grad(gradient_norm)(qkv, "dense"), strict=True
    ):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_mapped_over_examples(small_tiles):
    """Checks vmap, with the mapped axis on some of the arguments only."""
    q, k, v, weights = arrays(50, 70)

    def gradients(q, k):
        def loss(q, k):
            out = gaussian_attention(q[None], k[None], v[:1], scale=0.5, implementation="chunked")
            return (out * weights[:1]).sum()

        return jax.grad(loss, argnums=(0, 1))(q, k)

    mapped = jax.vmap(gradients, in_axes=(0, None))(q, k[0])
    for b in range(2):
        for mine, expected in zip(mapped, gradients(q[b], k[0]), strict=True):
            np.testing.assert_allclose(mine[b], expected, rtol=1e-5, atol=1e-5)


# Mask shapes that broadcast to [batch, heads, q_length, kv_length].
MASKS = [(2, 2, 50, 70), (1, 1, 50, 70), (2, 1, 1, 70), (1, 2, 1, 70), (2, 2, 50, 1), (70,)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_masks_of_queries_and_keys(shape, implementation, small_tiles):
    """Compares values, gradients and tangents of a masked causal attention with float64."""
    rng = np.random.default_rng(3)
    mask = rng.random(shape) < 0.6
    mask[..., -1] = shape[-1] == 1  # if the mask has keys, all queries mask the last one
    *qkv, weights = arrays(50, 70)
    if not mask[..., -1].any():
        qkv[1:] = [x.at[:, -1].set(jnp.nan) for x in qkv[1:]]
    terms = np.broadcast_to(mask, (2, 2, 50, 70)) & np.tri(50, 70, dtype=bool)

    def reference(q, k, v):
        k, v = np.nan_to_num(k), np.nan_to_num(v)
        out = [
            [
                (gaussian_kernel(q[b, :, h], k[b, :, h], 0.6) * terms[b, h]) @ v[b, :, h]
                for h in range(2)
            ]
            for b in range(2)
        ]
        return np.swapaxes(np.array(out), 1, 2)

    @jax.jit
    def attend(*qkv):
        return kernelized_attention(
            *qkv, scale=0.6, full_mask=mask, is_causal=True, implementation=implementation
        )

    exact = reference(*(np.asarray(x, np.float64) for x in qkv))
    np.testing.assert_allclose(attend(*qkv), exact, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda *qkv: (attend(*qkv) * weights).sum(), argnums=(0, 1, 2))(*qkv)
    clean = [jnp.nan_to_num(x) for x in qkv]
    assert_directional_derivatives(
        gradients,
        lambda *qkv: (reference(*qkv) * np.asarray(weights)).sum(),
        clean,
        rng,
        tolerance=1e-4,
    )
    directions = arrays(50, 70, seed=7)[:3]
    tangent = jax.jvp(lambda *qkv: (attend(*qkv) * weights).sum(), clean, directions)[1]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose(tangent, expected, rtol=1e-3, atol=1e-3)


def test_a_mask_that_cannot_be_honoured_is_refused():
    q, k, v, _ = arrays(4, 6)
    for attend in (kernelized_attention, jax.jit(kernelized_attention)):
        with pytest.raises(ValueError, match=r"= \(2, 2, 4, 6\); got \(2, 3, 4, 6\)"):
            attend(q, k, v, full_mask=jnp.ones((2, 3, 4, 6), bool))
        with pytest.raises(ValueError, match="must be bool; got float32"):
            attend(q, k, v, full_mask=jnp.ones((4, 6)))
    with pytest.raises(ValueError, match='choose "auto", "chunked" or "dense"'):
        kernelized_attention(q, k, v, is_causal=True, implementation="pallas")


def test_causality_needs_no_mask_in_memory():
    def temporaries_of(length):
        return temporaries(functools.partial(kernelized_attention, is_causal=True), 1, length)

    assert temporaries_of(32768) < 5 * temporaries_of(8192)


@pytest.mark.parametrize("implementation", platforms.IMPLEMENTATIONS)
def test_empty_sequences(implementation):
    for lengths in ((0, 3), (3, 0)):
        q, k, v, _ = arrays(*lengths)
        out = kernelized_attention(q, k, v, implementation=implementation)
        np.testing.assert_array_equal(out, np.zeros(q.shape))


def test_an_unknown_implementation_is_refused():
    q, k, v, _ = arrays(4, 4)
    with pytest.raises(ValueError, match="auto, dense, chunked, pallas"):
        kernelized_attention(q, k, v, implementation="flash")


def temporaries(function, batch, length, *, head_dim=32):
    """Bytes of temporaries that the gradients of a function's summed output need."""
    shape = jax.ShapeDtypeStruct((batch, length, 2, head_dim), jnp.float32)
    gradients = jax.jit(jax.grad(lambda q, k, v: function(q, k, v).sum(), argnums=(0, 1, 2)))
    return gradients.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_at_the_length_of_text():
    """Four examples at the paper's Text length; the bounds catch a quarter more than measured."""
    assert temporaries(skyformer_attention, 4, 4096) < 32e6
    assert temporaries(kernelized_attention, 4, 4096) < 16e6
    dense = functools.partial(kernelized_attention, implementation="dense")
    assert temporaries(dense, 4, 4096) > 1e9  # else this test measures nothing


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    for function in (skyformer_attention, kernelized_attention):
        per_token = [temporaries(function, 1, n) / n for n in (8192, 65536, 262144)]
        assert per_token[1] <= per_token[0] and per_token[2] <= per_token[1]
    assert temporaries(kernelized_attention, 1, 65536) < 1e9
