"""Rotary positions: equal to the paper's complex products, relative, and alike in both modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyformer_jax.attention.rotary import rotate
from skyformer_jax.layers import MultiHeadAttention
from skyformer_jax.models import Classifier
from skyformer_jax.nnx_layers import MultiHeadAttention as NnxAttention

RNG = np.random.default_rng(0)


def test_rotation_is_a_product_with_complex_numbers():
    x, positions = RNG.normal(size=(2, 7, 3, 8)), np.arange(5, 12)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = positions[:, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angles)[None, :, None]
    out = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    with pytest.raises(ValueError, match="even head_dim"):
        rotate(jnp.zeros((1, 2, 1, 3)), jnp.arange(2))


def test_distances_depend_on_the_difference_of_positions():
    x, y = (jnp.asarray(RNG.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def distance(i, j):
        return float(((rotate(x, jnp.array([i])) - rotate(y, jnp.array([j]))) ** 2).sum())

    np.testing.assert_allclose(distance(3, 10), distance(103, 110), rtol=1e-4)
    assert abs(distance(3, 10) - distance(3, 11)) > 1e-3


@pytest.mark.parametrize("name", ["skyformer", "reformer"])
def test_modules_agree_and_see_positions(name):
    x = jnp.asarray(RNG.normal(size=(2, 12, 16)), jnp.float32)
    layer = MultiHeadAttention(name, 2, 8, rotary=True)
    variables = layer.init(jax.random.key(0), x)
    module = NnxAttention(name, 2, 16, 8, rotary=True, rngs=nnx.Rngs(0))
    for part, values in variables["params"].items():
        getattr(module, part).kernel[...] = values["kernel"]
        getattr(module, part).bias[...] = values["bias"]
    for part, values in variables.get("fixed", {}).items():
        getattr(module, part)[...] = values
    out = layer.apply(variables, x)
    np.testing.assert_allclose(module(x), out, atol=1e-5)
    order = np.random.default_rng(1).permutation(12)
    assert np.abs(layer.apply(variables, x[:, order]) - out[:, order]).max() > 1e-3


def test_a_classifier_with_rotary_positions_has_no_table_of_positions():
    model = Classifier(
        *("skyformer", {"num_landmarks": 8, "conv_size": 3}, 20, 64, 3, 1, 16, 2, 8, 16, 0.0),
        pooling="mean",
        positions="rotary",
    )
    tokens = RNG.integers(0, 20, (2, 30))
    mask = np.arange(30) < np.array([[30], [11]])
    logits, variables = jax.jit(model.init_with_output)(jax.random.key(0), tokens, mask)
    assert "position_embedding" not in variables["params"]
    padded = jax.jit(model.apply)(
        variables, np.pad(tokens, ((0, 0), (0, 20))), np.pad(mask, ((0, 0), (0, 20)))
    )
    np.testing.assert_allclose(padded, logits, atol=1e-5)
