"""The quantities in the figures, checked against their mathematical definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import tiny_config

from experiments.paper import analysis
from skyformer_jax.attention import softmax_attention
from skyformer_jax.models import build_model


def test_skyformer_of_softmax_with_all_rows_is_softmax():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 12, 2, 8))
    mask = jnp.arange(12) < jnp.array([[12], [7]])
    exact = softmax_attention(query, key, value, mask=mask)
    all_rows = {"num_landmarks": 24, "inverse": "cholesky", "mask": mask}
    found = analysis.skyformer_of_softmax(query, key, value, gamma=1e-6, **all_rows)
    np.testing.assert_allclose(found, exact, atol=2e-4)
    # The regularization applies to the Gaussian kernel: recompute it in float64.
    rows = np.concatenate([query[0, :, 0], key[0, :, 0]]).astype(np.float64)
    gauss = np.exp(-(8**-0.5) / 2 * ((rows[:, None] - rows) ** 2).sum(-1))
    approximate = gauss[:12] @ np.linalg.solve(gauss + 0.5 * np.eye(24), gauss[:, 12:])
    approximate = approximate * np.exp(8**-0.5 / 2 * (rows[12:] ** 2).sum(-1))
    expected = approximate / approximate.sum(axis=1, keepdims=True) @ np.asarray(value[0, :, 0])
    found = analysis.skyformer_of_softmax(query, key, value, gamma=0.5, **all_rows)
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-4)


def test_masked_keys_of_great_norm_do_not_matter():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 8))
    mask = jnp.arange(12)[None] < 9
    expected = analysis.skyformer_of_softmax(query, key, value, mask=mask)
    found = analysis.skyformer_of_softmax(
        query, jnp.where(mask[..., None, None], key, 1e3), value, mask=mask
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_spectral_error_and_singular_values():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(9, 4)))[0]
    exact = np.zeros((1, 9, 2, 4))
    exact[0, :, 0], exact[0, :, 1] = left * [4, 1, 1, 1], left * [2, 2, 1, 0]
    error = exact + (left * [0, 3, 1, 0])[None, :, None]
    np.testing.assert_allclose(analysis.spectral_error(error, exact), [[3 / 4, 3 / 2]])

    orthogonal = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    matrix = (left * [8, 4, 2, 1]) @ orthogonal
    outputs = np.concatenate([matrix, 100 * rng.normal(size=(3, 4))])[None]
    found = analysis.singular_values(outputs, np.arange(12)[None] < 9)
    np.testing.assert_allclose(found, [[1, 1 / 2, 1 / 4, 1 / 8]])


@pytest.mark.slow
def test_instability_of_a_small_step_is_that_of_the_derivative():
    config = tiny_config("kernelized")
    config.model.num_documents = 2
    model = build_model(config)
    length = config.model.max_length
    shape = (3, 2, length)
    tokens = jax.random.randint(jax.random.key(0), shape, 1, config.model.vocab_size)
    mask = jnp.broadcast_to(jnp.arange(length) < length - 2, shape)
    before = model.init(jax.random.key(1), tokens, mask)
    direction = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(2), x.shape), before["params"]
    )
    after = {"params": jax.tree.map(lambda x, d: x + 2e-4 * d, before["params"], direction)}

    rng = jax.random.key(3)
    found = analysis.instability(model, before, after, tokens, mask, rng)
    last = f"block_{config.model.num_layers - 1}"
    for name, score in (("final_norm", found.normed), (last, found.raw)):

        def embed(params, name=name):
            (out,) = analysis.outputs_of(name, model, {"params": params}, tokens, mask)
            return out.reshape(*shape, -1)[..., : length - 2, :]

        _, change = jax.jvp(embed, (before["params"],), (direction,))
        seen = {k: v for k, v in direction.items() if not k.startswith("head")}
        distance = sum((x**2).sum() for x in jax.tree.leaves(seen))
        np.testing.assert_allclose(score, float((change**2).sum() / 3 / distance), rtol=0.02)
    with pytest.raises(ValueError, match="same before and after"):
        analysis.instability(model, before, before, tokens, mask, rng)
    with pytest.raises(ValueError, match="no module"):
        analysis.outputs_of("block_9", model, before, tokens, mask)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dropout"), [("softmax", 0.1), ("skyformer", 0.0)])
def test_the_noise_of_training_is_in_one_of_the_changes_alone(name, dropout):
    config = tiny_config(name)
    config.model.dropout = dropout
    model = build_model(config)
    tokens = jnp.ones((2, config.model.max_length), jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    same = jax.jit(model.init)(jax.random.key(1), tokens, mask)
    change = analysis.embedding_change(model, same, same, tokens, mask, jax.random.key(2))
    assert (change.normed == 0).all()
    assert (change.raw == 0).all()
    assert (change.with_noise > 0).all()
    assert change.with_noise[0] != change.with_noise[1]  # each example gets its own draw
