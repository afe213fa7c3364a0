"""JAX's modes with 64 bits enabled, and with rank and dtype promotion refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_on import run_on
from test_attention import RANDOM, SMALL, call, inputs, masks
from test_model import tiny_config
from test_step import random_batch, sharded

from skyformer_jax import attention, models, nnx_layers
from skyformer_jax.layers import MultiHeadAttention
from skyformer_jax.training.sharded_step import make_train_step
from skyformer_jax.training.state import init_states

LANDMARKS = [
    pytest.param(
        "skyformer", {"landmarks": kind, "num_landmarks": 8}, id=kind, marks=pytest.mark.slow
    )
    for kind in ("strided", "segment_means", "kmeans++", "leverage")
]
CASES = [pytest.param(name, SMALL.get(name, {}), id=name) for name in attention.NAMES]
CASES += [pytest.param("nystromformer", {"conv_kernel": np.ones((3, 2), np.float32)}, id="conv")]
CASES += [
    pytest.param(
        "skyformer",
        {
            "landmarks": np.ones((4, 2, 8), np.float32),
            "normalize": True,
            "conv_kernel": np.ones((3, 2, 8), np.float32),
        },
        id="learned",
    )
]


def enable_x64(value):
    """Calls jax.enable_x64 or, in older JAX versions, jax.experimental.enable_x64."""
    context = getattr(jax, "enable_x64", None)
    if context is None:
        from jax.experimental import enable_x64 as context
    return context(value)


def value_and_gradients(name, options, arrays, mask, rng):
    """Loss, output and gradients; the loss's sine weights every output differently."""

    def loss(q, k, v):
        out = call(name, q, k, v, mask=mask, rng=rng, **options)
        return jnp.sin(out).astype(jnp.float32).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)


def outputs(name, options, arrays, mask, rng):
    return jax.jit(lambda q, k, v: call(name, q, k, v, mask=mask, rng=rng, **options))(*arrays)


@pytest.mark.parametrize(("name", "options"), CASES + LANDMARKS)
@pytest.mark.parametrize("with_rng", [pytest.param(False, marks=pytest.mark.slow), True])
def test_64_bits_change_nothing_for_float32(name, options, with_rng):
    arrays, mask = [np.asarray(x) for x in inputs(11, 11)], np.asarray(masks(3, 11))
    rng = jax.random.key(3) if with_rng else None
    expected = jax.device_get(value_and_gradients(name, options, arrays, mask, rng))
    with enable_x64(True):
        rng = jax.random.key(3) if with_rng else None
        found = jax.device_get(value_and_gradients(name, options, arrays, mask, rng))
        as_float64 = [x.astype(np.float64) for x in arrays]
        out = outputs(name, options, as_float64, mask, rng)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, expected[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES + LANDMARKS)
def test_attentions_pass_strict_promotion(name, options):
    arrays, mask = inputs(11, 11), masks(3, 11)
    rng = jax.random.key(3) if name in RANDOM else None
    expected = value_and_gradients(name, options, arrays, mask, rng)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = value_and_gradients(name, options, arrays, mask, rng)
        half = [x.astype(jnp.bfloat16) for x in arrays]
        assert outputs(name, options, half, mask, rng).dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("scale", [np.float64(0.3), jnp.asarray(0.5, jnp.bfloat16)], ids=repr)
@pytest.mark.parametrize(("name", "options"), CASES + LANDMARKS)
def test_attentions_pass_strict_promotion_with_64_bits(name, options, scale):
    """Only traces, with a scale of another dtype and arrays of different dtypes."""
    arrays, mask = inputs(11, 11), masks(3, 11)
    rng = None if scale.dtype == np.float64 else jax.random.key(3)
    with enable_x64(True), jax.numpy_dtype_promotion("strict"):
        out, gradients = jax.eval_shape(
            lambda *x: value_and_gradients(name, {**options, "scale": scale}, x, mask, rng),
            arrays[0].astype(jnp.bfloat16),
            *arrays[1:],
        )
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert out[1].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", attention.NAMES)
def test_layers_models_and_steps_pass_strict_promotion(name):
    """Also trains with 64 bits enabled, with the same result."""
    x, mask = inputs(12, 12, heads=1)[0][:, :, 0], masks(3, 12)
    config = tiny_config(name, num_layers=1, ngrams=(3,))

    def trained():
        run = run_on(config, 2, optimizer=optax.sgd(0.1), log_every=2, statistics=True)
        states, sums = make_train_step(run)(init_states(run), sharded(run, random_batch(8)))
        return jax.device_get((states, sums))

    expected = trained()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        options = SMALL.get(name, {})
        layer = MultiHeadAttention(name, num_heads=2, head_dim=4, options=options)
        layer.init_with_output(jax.random.key(0), x, mask=mask)
        nnx_layers.MultiHeadAttention(
            name, 2, 8, 4, options=options, max_length=12, rngs=nnx_layers.nnx.Rngs(0)
        )(x, mask=mask)
        model = models.build_model(tiny_config(name, num_layers=1, positions="sinusoidal"))
        tokens = jnp.ones((3, 48), jnp.uint8)
        model.init_with_output(jax.random.key(0), tokens, tokens > 0)
        jax.tree.map(np.testing.assert_array_equal, trained(), expected)
    with enable_x64(True):
        found = trained()
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
