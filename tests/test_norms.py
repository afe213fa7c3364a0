"""The layer norm against float64 and Flax, its derivatives in both modes, and its sums."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_directional_derivatives

from skyformer_jax.attention import sums
from skyformer_jax.norms import EPSILON, LayerNorm, layer_norm


def reference(x, scale, bias):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


def arrays(shape=(2, 7, 24), offset=2.0):
    rng = np.random.default_rng(0)
    return rng, [
        jnp.asarray(rng.normal(size=size) + shift, jnp.float32)
        for size, shift in ((shape, offset), (shape[-1:], 1.0), (shape[-1:], 0.0), (shape, 0.0))
    ]


@pytest.mark.parametrize("mapped", [False, True])
def test_values_and_derivatives(mapped):
    rng, (x, scale, bias, weights) = arrays()
    function = layer_norm
    if mapped:  # the training step maps it over examples too

        def function(x, scale, bias):
            return jax.vmap(layer_norm, in_axes=(0, None, None))(x, scale, bias)

    out, pullback = jax.vjp(jax.jit(function), x, scale, bias)
    np.testing.assert_allclose(out, reference(x, scale, bias), atol=5e-6)

    def loss(*args):
        return (reference(*args) * np.asarray(weights, np.float64)).sum()

    gradients = pullback(weights)
    assert_directional_derivatives(gradients, loss, (x, scale, bias), rng, tolerance=1e-4)
    dots = tuple(jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (x, scale, bias))
    tangent = jax.jvp(function, (x, scale, bias), dots)[1]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, dots, strict=True))
    assert float((tangent * weights).sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_module_is_flaxs(dtype):
    _, (x, scale, bias, _) = arrays()
    flaxs = nn.LayerNorm(epsilon=EPSILON, dtype=jnp.dtype(dtype))
    ours, x = LayerNorm(jnp.dtype(dtype)), x.astype(dtype)
    shapes = [jax.eval_shape(m.init, jax.random.key(0), x) for m in (flaxs, ours)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    variables = {"params": {"scale": scale, "bias": bias}}
    expected, found = (module.apply(variables, x) for module in (flaxs, ours))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32),
        expected.astype(jnp.float32),
        atol=1e-5 if dtype == "float32" else 0.05,
    )


def test_an_offset_costs_no_precision():
    _, (x, scale, bias, _) = arrays(offset=300.0)
    np.testing.assert_allclose(layer_norm(x, scale, bias), reference(x, scale, bias), atol=1e-3)


def test_products_are_sums_and_compilers_of_cpus_see_no_reduction():
    _, (x, *_) = arrays()
    np.testing.assert_allclose(sums.sum_last(x)[..., 0], x.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(sums.sum_rows(x)[..., 0, :], x.sum(-2), rtol=1e-5)

    def gradients(x, scale, bias, weights):
        return jax.vjp(layer_norm, x, scale, bias)[1](weights)

    lowered = jax.jit(gradients).trace(*arrays()[1]).lower(lowering_platforms=("cpu",))
    assert "stablehlo.reduce" not in lowered.as_text()
    lowered = jax.jit(gradients).trace(*arrays()[1]).lower(lowering_platforms=("tpu",))
    assert "stablehlo.reduce" in lowered.as_text() and "dot_general" not in lowered.as_text()
