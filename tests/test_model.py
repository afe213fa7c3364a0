"""The classifier: shapes, padding, pooling, and its configuration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from skyformer_jax import attention, encoder, models, nnx_layers
from skyformer_jax.layers import MultiHeadAttention


def tiny_config(name="skyformer", **model):
    config = common.paper_config("listops_small", name, max_length=48)
    config.model.update({"width": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24, **model})
    if name == "skyformer":
        config.attention.num_landmarks = 12
    return config


def batch(length=48):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 16, (4, length)).astype(np.uint8)
    return tokens, np.arange(length) < np.array([[length], [20], [5], [1]])


def init(module, *args):
    """Returns NumPy variables from one compiled program."""
    return jax.device_get(jax.jit(module.init)(jax.random.key(0), *args))


all_attentions = pytest.mark.parametrize("name", attention.NAMES)


@all_attentions
def test_padding_is_invisible(name):
    model = models.build_model(tiny_config(name))
    tokens, mask = batch()
    variables = init(model, tokens, mask)
    apply = jax.jit(model.apply)
    logits = np.asarray(apply(variables, tokens, mask))
    assert logits.shape == (4, 10)
    junk = np.where(mask, tokens, 7).astype(np.uint8)
    np.testing.assert_array_equal(apply(variables, junk, mask), logits)
    short = apply(variables, tokens[1:3, :20], mask[1:3, :20])
    np.testing.assert_allclose(short, logits[1:3], rtol=1e-4, atol=1e-5)


@all_attentions
def test_layer_keeps_junk_in_padding_out_of_gradients(name):
    layer = MultiHeadAttention(name, 2, 4, {})
    x = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)
    mask = np.arange(9) < np.array([[6], [9]])
    variables = init(layer, x)
    params = variables["params"]

    @jax.jit
    @jax.grad
    def gradient(params, x):
        out = layer.apply({**variables, "params": params}, x, mask=mask)
        return jnp.where(mask[..., None], out, 0).sum()

    clean = gradient(params, x)
    dirty = gradient(params, np.where(mask[..., None], x, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_parameters_are_the_papers():
    """Compares the parameter count with one by hand: embeddings, 2 blocks, final norm, head."""
    config = common.paper_config("listops", "skyformer", max_length=2048)
    model = models.build_model(config)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 2048), int), jnp.ones((1, 2048), bool)
    )
    count = sum(x.size for x in jax.tree.leaves(shapes))
    block = 4 * (64 * 64 + 64) + 2 * 2 * 64 + (64 * 128 + 128) + (128 * 64 + 64)
    assert count == (16 + 2048) * 64 + 2 * block + 2 * 64 + (64 * 128 + 128) + (128 * 10 + 10)


def test_dense_layers_start_as_in_the_published_code():
    """Uniform in +-1/sqrt(fan_in), so with standard deviation 1/sqrt(3 fan_in)."""
    config = common.paper_config("listops", "softmax", max_length=8)
    tokens = np.zeros((1, 8), int)
    params = init(models.build_model(config), tokens, tokens == 0)["params"]
    block = params["block_0"]
    of_attention = block["attention_layer"].values()
    of_fan_in = {
        64: [*of_attention, block["mlp_in"], params["head_hidden"]],
        128: [block["mlp_out"], params["head_out"]],
    }
    module = nnx_layers.MultiHeadAttention("softmax", 2, 64, 32, rngs=nnx.Rngs(0))
    of_fan_in[64] += [
        {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for layer in (module.query, module.key, module.value, module.out)
    ]
    for fan_in, layers in of_fan_in.items():
        for layer in layers:
            for name, error in (("kernel", 0.05), ("bias", 0.5)):
                values = np.asarray(layer[name])
                assert np.abs(values).max() <= fan_in**-0.5
                np.testing.assert_allclose(values.std() * (3 * fan_in) ** 0.5, 1, atol=error)


def test_pooling():
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    pool = jax.jit(encoder.pool, static_argnums=2)
    mean = np.asarray(pool(x, mask, "mean"))
    np.testing.assert_allclose(mean[0], x[0, [0, 1, 3]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean[1], x[1].mean(0), rtol=1e-5)
    assert not mean[2].any()
    np.testing.assert_allclose(pool(x, mask, "padded_mean")[0], mean[0] * 3 / 5, rtol=1e-5)
    np.testing.assert_array_equal(pool(x, mask, "cls"), x[:, 0])


def test_axial_positions_are_a_row_and_a_column():
    """The sum of both tables, as a table of learned positions, gives the same logits."""
    tokens, mask = batch(30)
    axial, learned = (
        models.build_model(tiny_config("softmax", max_length=36, num_layers=1, positions=positions))
        for positions in ("axial", "learned")
    )
    params = init(axial, tokens, mask)["params"]
    shapes = jax.eval_shape(learned.init, jax.random.key(0), tokens, mask)["params"]
    rows, columns = (30 * params.pop(f"{name}_embedding") for name in ("row", "column"))
    assert rows.shape == columns.shape == (6, 16)
    table = (rows[:, None] + columns).reshape(36, 16)
    assert shapes["position_embedding"].shape == table.shape
    one_table = {"params": params | {"position_embedding": table}}
    own = {"params": params | {"row_embedding": rows, "column_embedding": columns}}
    apply, apply_learned = jax.jit(axial.apply), jax.jit(learned.apply)
    expected = np.asarray(apply_learned(one_table, tokens, mask))
    np.testing.assert_allclose(apply(own, tokens, mask), expected, rtol=1e-5, atol=1e-6)
    at = np.random.default_rng(0).permuted(np.tile(np.arange(36), (4, 1)), axis=1)[:, :30]
    moved = np.asarray(apply(own, tokens, mask, positions=at))
    assert abs(moved - expected).max() > 1e-2
    expected = apply_learned(one_table, tokens, mask, positions=at)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)


def test_sinusoidal_2d_positions():
    """Distances of encodings depend only on the rows and columns between two pixels."""
    found = np.asarray(encoder.sinusoids_2d(jnp.arange(36).reshape(2, 18), 16, 6)).reshape(36, 16)
    row, column = np.divmod(np.arange(36), 6)
    for index, own in ((row, found[:, :8]), (column, found[:, 8:])):
        angles = index[:, None] * 6.0 ** (-np.arange(4) / 4)
        expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        np.testing.assert_allclose(own, expected, atol=1e-6)
    distance = ((found[:, None] - found) ** 2).sum(-1).reshape(6, 6, 6, 6)
    np.testing.assert_allclose(distance[:5, :4, :5, :4], distance[1:, 2:, 1:, 2:], atol=1e-5)
    assert (distance[0, 0] + 10 * np.eye(1, 36).reshape(6, 6)).argmin() in (1, 6)


def test_models_see_sinusoidal_2d_positions():
    """They see where the given positions are, and no parameters belong to them."""
    tokens, mask = batch(30)
    settings = {"max_length": 36, "num_layers": 1, "positions": "sinusoidal_2d"}
    model = models.build_model(tiny_config("softmax", **settings))
    variables = init(model, tokens, mask)
    names = "token_embedding block_0 final_norm head_hidden head_out"
    assert variables["params"].keys() == set(names.split())
    apply = jax.jit(model.apply)
    at = np.broadcast_to(np.arange(30), tokens.shape)
    expected = np.asarray(apply(variables, tokens, mask))
    given = apply(variables, tokens, mask, positions=at)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)
    assert abs(apply(variables, tokens, mask, positions=at[:, ::-1]) - expected).max() > 1e-4


def test_positions_may_be_given():
    """The consecutive ones are the default."""
    tokens, mask = batch()
    model = models.build_model(tiny_config("softmax", num_layers=1))
    variables = init(model, tokens, mask)
    consecutive = np.broadcast_to(np.arange(48), tokens.shape)
    apply = jax.jit(model.apply)
    expected = np.asarray(apply(variables, tokens, mask))
    np.testing.assert_array_equal(apply(variables, tokens, mask, positions=consecutive), expected)
    swapped, other = consecutive.copy(), tokens.copy()
    swapped[:, :2], other[:, :2] = [1, 0], tokens[:, 1::-1]
    permuted = np.asarray(apply(variables, other, mask, positions=swapped))
    np.testing.assert_allclose(permuted[:2], expected[:2], atol=1e-5)  # softmax does not see order
    with pytest.raises(TypeError, match="positions must be integers"):
        model.apply(variables, tokens, mask, positions=mask)
    with pytest.raises(ValueError, match="shape"):
        model.apply(variables, tokens, mask, positions=consecutive[:, 1:])
    rotary = models.build_model(tiny_config("softmax", num_layers=1, positions="rotary"))
    with pytest.raises(ValueError, match="rotary"):
        rotary.apply(variables, tokens, mask, positions=consecutive)


def test_landmarks_and_dropout_have_streams():
    model = models.build_model(tiny_config(num_layers=1))
    tokens, mask = batch()
    params = init(model, tokens, mask)
    apply = jax.jit(model.apply, static_argnames="deterministic")
    plain = apply(params, tokens, mask)
    np.testing.assert_array_equal(plain, apply(params, tokens, mask))
    for stream, deterministic in (("landmarks", True), ("dropout", False)):
        one, two = (
            np.asarray(
                apply(
                    params,
                    tokens,
                    mask,
                    deterministic=deterministic,
                    rngs={stream: jax.random.key(seed)},
                )
            )
            for seed in (1, 2)
        )
        assert np.abs(one - two).max() > 0


def test_models_are_hashable_and_name_what_is_wrong():
    model = models.build_model(tiny_config("skyformer"))
    assert hash(model) == hash(model.clone(attention_options=dict(model.attention_options)))
    tokens = jnp.ones((2, 48), int)
    for change, of_call, mask, message in (
        ({"pooling": "max"}, tokens, tokens > 0, "pooling must be one of mean, cls, padded_mean"),
        ({"positions": "relative"}, tokens, tokens > 0, "positions must be one of learned, axial"),
        ({"width": 7, "positions": "sinusoidal"}, tokens, tokens > 0, "an even width; got 7"),
        ({"positions": "axial"}, tokens, tokens > 0, "must be a square number.*; got 48"),
        (
            {"width": 6, "positions": "sinusoidal_2d", "max_length": 49},
            *(tokens, tokens > 0, "a width divisible by 4; got 6"),
        ),
        ({}, tokens, tokens, "mask must be bool, of the shape"),
        ({}, tokens, tokens[:1] > 0, "mask must be bool, of the shape"),
        ({}, tokens[:, :0], tokens[:, :0] > 0, "sequences must have at least one token"),
        ({}, tokens / 2, tokens > 0, "tokens must be integers; got float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            model.clone(**change).init(jax.random.key(0), of_call, mask)


def test_too_long_a_sequence_is_refused():
    model = models.build_model(tiny_config())
    params = jax.eval_shape(model.init, jax.random.key(0), *batch())
    with pytest.raises(ValueError, match="max_length=48"):
        jax.eval_shape(model.apply, params, *batch(49))


@pytest.mark.parametrize(  # one with learned parameters only, one with fixed variables
    ("name", "tolerance"),
    # Performer's gradients of queries and keys are small differences of large sums.
    [
        ("kernelized", 1e-5),
        pytest.param("skyformer", 1e-5, marks=pytest.mark.slow),
        pytest.param("performer", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_recomputed_blocks_are_the_same(name, tolerance):
    """remat keeps parameters, logits and gradients, and needs less memory for gradients."""
    tokens, mask = batch()
    plain, remat = (
        models.build_model(tiny_config(name, num_layers=4, remat=remat)) for remat in (False, True)
    )
    variables = init(plain, tokens, mask)
    jax.tree.map(np.testing.assert_array_equal, init(remat, tokens, mask), variables)

    def gradients(model):
        def loss(params):
            logits = model.apply({**variables, "params": params}, tokens, mask)
            return (logits**2).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(variables["params"]).compile()
        return compiled(variables["params"]), compiled.memory_analysis().temp_size_in_bytes

    (results, memory), (other_results, less_memory) = gradients(plain), gradients(remat)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance * np.abs(b).max()),
        other_results,
        results,
    )
    assert less_memory < 0.8 * memory


def test_recomputed_blocks_draw():
    """With remat, dropout and landmarks still depend only on their rngs."""
    tokens, mask = batch()
    model = models.build_model(tiny_config(num_layers=2, remat=True, dropout=0.5))
    variables = init(model, tokens, mask)

    @jax.jit
    def logits(seed):
        rngs = {"dropout": jax.random.key(seed), "landmarks": jax.random.key(seed + 1)}
        return model.apply(variables, tokens, mask, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(logits(0), logits(0))
    assert np.abs(np.asarray(logits(0)) - logits(5)).max() > 1e-3


@pytest.mark.parametrize("name", ["softmax", "kernelized", "skyformer"])
def test_bfloat16_is_for_activations_only(name):
    tokens, mask = batch()
    exact, rounded = (
        models.build_model(tiny_config(name, dtype=dtype)) for dtype in encoder.DTYPES
    )
    variables = init(rounded, tokens, mask)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    apply = jax.jit(functools.partial(rounded.apply, capture_intermediates=True))
    logits, state = apply(variables, tokens, mask)
    assert logits.dtype == jnp.float32
    (block,) = state["intermediates"]["block_0"]["__call__"]
    assert block.dtype == jnp.bfloat16
    expected = np.asarray(jax.jit(exact.apply)(variables, tokens, mask))
    scale = np.abs(expected).max()
    assert 0 < np.abs(logits - expected).max() < 0.05 * scale
