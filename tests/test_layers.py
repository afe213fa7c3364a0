"""The attentions inside Flax: our linen and NNX modules, and Flax's own with our attention_fn."""

import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grids import by_default
from test_attention import RANDOM, SELF_ONLY, SMALL, jitted, small

import skyformer_jax
from skyformer_jax import attention, layers, nnx_layers

ROOT = Path(__file__).parent.parent
LENGTH, WIDTH, HEADS, HEAD_DIM = 20, 16, 2, 8
QUICK = ("softmax", "kernelized", "skyformer", "linformer", "reformer")
all_attentions = pytest.mark.parametrize("name", attention.NAMES)
# One of each kind by default: with landmarks, with shared query and key, with its own arrays.
quick_attentions = by_default(*QUICK)
LAYER_OPTIONS = {
    **SMALL,
    "nystromformer": {"num_landmarks": 6, "conv_size": 5},
    "linformer": {"num_features": 6, "sharing": "none"},
}


@pytest.fixture(scope="module")
def batch():
    x = jax.random.normal(jax.random.key(0), (3, LENGTH, WIDTH))
    mask = jnp.arange(LENGTH) < jnp.array([[LENGTH], [13], [1]])
    return x, mask


def copy_to_nnx(params, module):
    for name, value in params.items():
        if isinstance(value, dict):
            copy_to_nnx(value, getattr(module, name))
        else:
            getattr(module, name)[...] = value


@functools.cache
def flax_modules(name, dropout=0.0):
    """Flax's linen and NNX multi-head attention with our attention_fn and equal parameters."""
    function = skyformer_jax.attention_fn(name, **SMALL.get(name, {}))
    linen = nn.MultiHeadAttention(HEADS, dropout_rate=dropout, attention_fn=function)
    params = linen.init(jax.random.key(1), jnp.zeros((1, LENGTH, WIDTH)), deterministic=True)
    params = params["params"]
    params = jax.tree.map(lambda x: x + 0.1, params)  # nonzero biases
    of_nnx = nnx.MultiHeadAttention(
        HEADS,
        WIDTH,
        dropout_rate=dropout,
        attention_fn=function,
        decode=False,
        rngs=nnx.Rngs(0),
    )
    copy_to_nnx(params, of_nnx)
    return linen, params, of_nnx


@quick_attentions
def test_flax_modules_take_the_attention(name, batch):
    """Linen, NNX and a manual computation agree for every form of padding mask in Flax."""
    x, mask = batch
    linen, params, of_nnx = flax_modules(name)

    def project(part):
        return jnp.einsum("bnw,whp->bnhp", x, params[part]["kernel"]) + params[part]["bias"]

    heads = small(name)(project("query"), project("key"), project("value"), mask=mask)
    expected = jnp.einsum("bnhp,hpw->bnw", heads, params["out"]["kernel"]) + params["out"]["bias"]
    real = np.asarray(mask)
    for form in (
        mask[:, None, None, :],
        nn.make_attention_mask(mask, mask),  # float32 [batch, 1, length, length]
        jnp.broadcast_to(mask[:, None, None, :], (3, HEADS, LENGTH, LENGTH)),
    ):
        by_linen = linen.apply({"params": params}, x, x, mask=form, deterministic=True)
        by_nnx = of_nnx(x, mask=form, deterministic=True)
        np.testing.assert_allclose(by_linen[real], expected[real], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(by_nnx[real], by_linen[real], rtol=1e-5, atol=1e-5)
    jitted = jax.jit(functools.partial(linen.apply, deterministic=True))
    under_jit = jitted({"params": params}, x, x, mask=nn.make_attention_mask(mask, mask))
    np.testing.assert_allclose(under_jit[real], expected[real], rtol=1e-4, atol=1e-4)


@quick_attentions
def test_flax_modules_train_with_dropout(name, batch):
    x, mask = batch
    linen, params, of_nnx = flax_modules(name, dropout=0.5)

    @jax.jit
    @jax.value_and_grad
    def loss(params, key):
        out = linen.apply(
            {"params": params},
            x,
            x,
            mask=mask[:, None, None],
            deterministic=False,
            rngs={"dropout": key},
        )
        return (jnp.where(mask[:, :, None], out, 0) ** 2).mean()

    first, gradients = loss(params, jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.any(gradients["query"]["kernel"])
    assert loss(params, jax.random.key(0))[0] == first
    assert loss(params, jax.random.key(1))[0] != first
    masked = {"mask": mask[:, None, None], "deterministic": False}
    one, again, two = (of_nnx(x, rngs=nnx.Rngs(dropout=i), **masked) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != two)


def test_dropout_keeps_the_mean():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 6, 1, 8)).astype(np.float32)
    function = attention.attention_fn("softmax")
    draw = jax.jit(jax.vmap(lambda key: function(
        q, k, v, dropout_rng=key, dropout_rate=0.3, deterministic=False)))  # fmt: skip
    draws = draw(jax.random.split(jax.random.key(1), 20000))
    np.testing.assert_allclose(np.mean(draws, 0), function(q, k, v), atol=0.02)


@all_attentions
def test_what_cannot_be_honoured_is_refused(name, batch):
    x, _ = batch
    q = k = v = jnp.ones((3, LENGTH, HEADS, HEAD_DIM)) * x[:, :, None, :HEAD_DIM]
    function = attention.attention_fn(name, **SMALL.get(name, {}))
    causal = jnp.tri(LENGTH, dtype=bool)[None, None]
    bias = jnp.ones((1, HEADS, LENGTH, LENGTH)).at[..., 0].set(2)
    restricted = ({"mask": causal}, {"is_causal": True})
    if name == "softmax":
        reference = nn.dot_product_attention(q, k, v, mask=causal)
        for options in restricted:
            np.testing.assert_allclose(function(q, k, v, **options), reference, atol=1e-5)
        np.testing.assert_allclose(
            function(q, k, v, bias=bias), nn.dot_product_attention(q, k, v, bias=bias), atol=1e-5
        )
        return
    with pytest.raises(ValueError, match=r"sow: leave sow_weights=False; those that do: softmax$"):
        function(q, k, v, module=object())
    with pytest.raises(ValueError, match=rf"{name!r} does not support a bias; use: softmax$"):
        function(q, k, v, bias=bias)
    if name == "kernelized":
        reference = attention.kernelized_attention(q, k, v, full_mask=causal)
        for options in restricted:
            np.testing.assert_allclose(function(q, k, v, **options), reference, atol=1e-5)
        return
    with pytest.raises(
        ValueError, match=rf"{name!r} does not support a .*; use: softmax, kernelized$"
    ):
        function(q, k, v, mask=causal)
    if name == "performer":
        reference = attention.performer_attention(q, k, v, is_causal=True, **SMALL.get(name, {}))
        np.testing.assert_allclose(function(q, k, v, is_causal=True), reference, atol=1e-5)
    else:
        says = "would tell of later" if name == "skyformer" else r"use: softmax, .*performer$"
        with pytest.raises(ValueError, match=says):
            function(q, k, v, is_causal=True)
    # Under jit the mask's values are unknown, so an example with an unsupported mask becomes NaN.
    half = jnp.where(jnp.arange(3)[:, None, None, None] == 1, causal, True)
    out = jax.jit(functools.partial(function, q, k, v))(mask=half)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[::2]).all()


@pytest.mark.parametrize(
    "lead", [(), *(pytest.param(lead, marks=pytest.mark.slow) for lead in ((3,), (2, 3)))]
)
def test_softmax_takes_every_mask_and_bias_that_flax_takes(lead):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(*lead, n, HEADS, HEAD_DIM)).astype(np.float32) for n in (7, 9, 9))
    ours, theirs = map(jax.jit, (attention.attention_fn("softmax"), nn.dot_product_attention))
    for tail in ((7, 9), (HEADS, 1, 9), (1, 7, 9), (1, 1, 9), (HEADS, 7, 1), (9,)):
        for shape in (tail, (*[1] * len(lead), *tail), (*lead, *tail)):
            if len(shape) > len(lead) + 3 or (shape != tail and len(tail) < 3):
                continue
            mask, bias = rng.random(shape) < 0.7, rng.normal(size=shape).astype(np.float32)
            mask[..., -1:] = True  # without any key, Flax averages all values
            for form in (mask, mask.astype(np.float32)):
                found = ours(q, k, v, mask=form, bias=bias)
                expected = theirs(q, k, v, mask=form, bias=bias)
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@all_attentions
def test_masks_of_wrong_shapes_are_named_with_both_shapes(name):
    q = jnp.ones((3, LENGTH, HEADS, HEAD_DIM))
    function = attention.attention_fn(name, **SMALL.get(name, {}))
    for shape in ((3, LENGTH), (3, 1, 1, LENGTH + 1), (2, 1, 1, LENGTH), (1, 3, 1, 1, LENGTH)):
        message = rf"mask must be .* = \(3, 2, 20, 20\); got {re.escape(str(shape))}"
        for call in (function, jax.jit(function)):
            with pytest.raises(ValueError, match=message):
                call(q, q, q, mask=jnp.ones(shape, bool))


def test_softmax_sows_its_weights_as_flax_does(batch):
    x, mask = batch
    mask = mask[:, None, None, :] & jnp.tri(LENGTH, dtype=bool)
    linen, params, of_nnx = flax_modules("softmax")
    reference = nn.MultiHeadAttention(HEADS)
    (out, sown), (expected, theirs) = (
        jax.jit(functools.partial(module.apply, sow_weights=True, mutable=["intermediates"]))(
            {"params": params}, x, mask=mask
        )
        for module in (linen, reference)
    )
    (weights,), (expected_weights,) = (
        collections["intermediates"]["attention_weights"] for collections in (sown, theirs)
    )
    np.testing.assert_allclose(weights, expected_weights, atol=1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    of_nnx(x, mask=mask, sow_weights=True, deterministic=True)
    (by_nnx,) = nnx.pop(of_nnx, nnx.Intermediate)["attention_weights"].get_value()
    np.testing.assert_allclose(by_nnx, weights, atol=1e-5)
    nothing = skyformer_jax.attention.softmax.softmax_weights(
        *jnp.ones((2, 3, 5, HEADS, HEAD_DIM)), mask=jnp.zeros((3, 5), bool)
    )
    assert not np.any(nothing)


@quick_attentions
def test_modules_share_heads_of_keys_and_values(name, batch):
    """Linen and NNX modules agree with fewer key-value heads, and so does attention_fn."""
    x, mask = batch
    options = LAYER_OPTIONS.get(name, {})
    grouped = {"num_kv_heads": 2, "value_head_dim": 3}
    linen = layers.MultiHeadAttention(name, 4, HEAD_DIM, options, **grouped)
    variables = linen.init(jax.random.key(2), x)
    params = variables["params"]
    shapes = {k: v["kernel"].shape for k, v in params.items() if isinstance(v, dict)}
    assert shapes["query"] == (WIDTH, 4, HEAD_DIM)
    assert shapes.get("key", (WIDTH, 2, HEAD_DIM)) == (WIDTH, 2, HEAD_DIM)
    assert shapes["value"] == (WIDTH, 2, 3)
    assert shapes["out"] == (4, 3, WIDTH)
    of_nnx = nnx_layers.MultiHeadAttention(
        name, 4, WIDTH, HEAD_DIM, options=options, max_length=LENGTH, rngs=nnx.Rngs(0), **grouped
    )
    for collection in variables.values():
        copy_to_nnx(collection, of_nnx)
    expected = jax.jit(linen.apply)(variables, x, mask=mask)
    np.testing.assert_allclose(of_nnx(x, mask=mask), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of num_kv_heads; got 4 and 3"):
        layers.MultiHeadAttention(name, 4, HEAD_DIM, options, num_kv_heads=3).init(
            jax.random.key(2), x
        )
    q = jax.random.normal(jax.random.key(1), (3, LENGTH, 4, HEAD_DIM))
    k = q[:, :, ::2]
    function = attention.attention_fn(name, **SMALL.get(name, {}))
    np.testing.assert_allclose(
        function(q, k, k[..., :3], mask=mask[:, None, None]),
        function(q, *(jnp.repeat(y, 2, axis=2) for y in (k, k[..., :3])), mask=mask[:, None, None]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_attention_fn_refuses_what_needs_a_module():
    with pytest.raises(ValueError, match=r"MultiHeadAttention from skyformer_jax\.layers"):
        attention.attention_fn("nystromformer", conv_size=33)
    with pytest.raises(ValueError, match="choose one of: softmax"):
        attention.attention_fn("performerr")


def test_attention_fn_takes_leading_axes_dtype_and_rng():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 3, 30, 2, 8)).astype(np.float32)
    mask = np.arange(30) < np.array([30, 4, 17])[None, :, None, None, None]
    mask = np.broadcast_to(mask, (2, 3, 1, 1, 30))
    function = jax.jit(
        attention.attention_fn("skyformer", num_landmarks=6, rng=jax.random.key(3)),
        static_argnames=("precision", "dtype"),
    )
    out = np.asarray(function(q, k, v, mask=mask, precision=jax.lax.Precision.HIGHEST))
    flat = (x.reshape(6, 30, 2, 8) for x in (q, k, v))
    expected = small("skyformer")  # has other options, to show that they matter
    assert out.shape == q.shape
    direct = jitted("skyformer", num_landmarks=6)(
        *flat, mask=mask.reshape(6, 30), rng=jax.random.key(3)
    )
    np.testing.assert_allclose(out.reshape(6, 30, 2, 8), direct, rtol=1e-5, atol=1e-5)
    assert np.any(out[0] != expected(q[0], k[0], v[0], mask=mask[0, :, 0, 0]))
    assert function(q, k, v, mask=mask, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@quick_attentions
def test_linen_and_nnx_modules_agree(name, batch):
    x, mask = batch
    options = LAYER_OPTIONS.get(name, {})
    linen = layers.MultiHeadAttention(name, HEADS, HEAD_DIM, options)
    variables = linen.init(jax.random.key(2), x)
    of_nnx = nnx_layers.MultiHeadAttention(
        name, HEADS, WIDTH, HEAD_DIM, options=options, max_length=LENGTH, rngs=nnx.Rngs(0)
    )
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (variables["params"], nnx.state(of_nnx, nnx.Param))
    ]
    assert counts[0] == counts[1]
    for collection in variables.values():
        copy_to_nnx(collection, of_nnx)
    expected = linen.apply(variables, x, mask=mask)
    np.testing.assert_allclose(of_nnx(x, mask=mask), expected, rtol=1e-5, atol=1e-5)
    jitted = nnx.jit(lambda module, x: module(x, mask=mask))
    np.testing.assert_allclose(jitted(of_nnx, x), expected, rtol=1e-4, atol=1e-5)
    shared = attention.REGISTRY[name].shared_query_key
    assert ("key" in variables["params"]) == (not shared)
    if name in SELF_ONLY or "conv_size" in options:
        for module in (functools.partial(linen.apply, variables), of_nnx):
            with pytest.raises(
                ValueError, match=r"itself|leave out inputs_kv|q_length == kv_length"
            ):
                module(x[:, :5], x)
    else:
        cross = linen.apply(variables, x[:, :5], x, mask=mask)
        np.testing.assert_allclose(of_nnx(x[:, :5], x, mask=mask), cross, rtol=1e-5, atol=1e-5)


@quick_attentions
def test_modules_draw_by_their_streams(name, batch):
    x, _ = batch
    stream = attention.REGISTRY[name].stream
    linen = layers.MultiHeadAttention(name, HEADS, HEAD_DIM, SMALL.get(name, {}))
    variables = linen.init(jax.random.key(2), x)
    of_nnx = nnx_layers.MultiHeadAttention(
        name, HEADS, WIDTH, HEAD_DIM, options=SMALL.get(name, {}), max_length=LENGTH,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    apply = jax.jit(lambda rngs: linen.apply(variables, x, rngs=rngs))
    plain = apply({})
    for given in ("landmarks", "features"):
        one, two = (apply({given: jax.random.key(i)}) for i in (1, 2))
        # Linformer's projections are learned parameters.
        draws = given == stream and name in RANDOM and name != "linformer"
        assert np.any(one != two) == draws
        assert np.any(one != plain) == draws
        one, two = (of_nnx(x, rngs=nnx.Rngs(**{given: i})) for i in (1, 2))
        assert np.any(one != two) == draws
    np.testing.assert_array_equal(of_nnx(x), of_nnx(x))


@pytest.mark.parametrize("name", ["performer", "reformer", "bigbird"])
def test_what_is_fixed_is_drawn_at_init_and_kept(name, batch):
    x, _ = batch
    linen = layers.MultiHeadAttention(name, HEADS, HEAD_DIM, SMALL[name])
    variables, others = (linen.init(jax.random.key(i), x) for i in (2, 3))
    (kept,), (other,) = (jax.tree.leaves(v["fixed"]) for v in (variables, others))
    assert np.any(kept != other)
    out = linen.apply(variables, x)
    assert np.any(out != linen.apply({**variables, "fixed": others["fixed"]}, x))
    with pytest.warns(UserWarning, match="without the collection 'fixed'"):
        linen.apply({"params": variables["params"]}, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = attention.REGISTRY[name].stream
        rngs = {stream: jax.random.key(0)}
        linen.apply({"params": variables["params"]}, x, rngs=rngs)


def test_linformer_serves_shorter_sequences_than_its_own(batch):
    x, mask = batch
    linen = layers.MultiHeadAttention("linformer", HEADS, HEAD_DIM, {"num_features": 6})
    variables = linen.init(jax.random.key(2), x)
    short = linen.apply(variables, x[1:2, :13])
    np.testing.assert_allclose(short, linen.apply(variables, x, mask=mask)[1:2, :13], atol=1e-5)
    with pytest.raises(ValueError, match="20 tokens at most; got 40"):
        linen.apply(variables, jnp.concatenate([x, x], axis=1))
    with pytest.raises(ValueError, match="max_length"):
        nnx_layers.MultiHeadAttention("linformer", HEADS, WIDTH, HEAD_DIM, rngs=nnx.Rngs(0))


@all_attentions
def test_modules_are_hashable_and_have_dtypes(name):
    """Linen modules and NNX graphs work as static arguments of jit, as Flax's own do."""
    options = SMALL.get(name, {})
    x = jnp.ones((2, 12, WIDTH), jnp.bfloat16)
    linen = layers.MultiHeadAttention(name, HEADS, HEAD_DIM, dict(options))
    assert hash(linen) == hash(layers.MultiHeadAttention(name, HEADS, HEAD_DIM, dict(options)))
    for dtype, param_dtype in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        module = nnx_layers.MultiHeadAttention(
            name,
            *(HEADS, WIDTH, HEAD_DIM),
            options=dict(options),
            max_length=12,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        )
        graph, state = nnx.split(module)

        @functools.partial(jax.jit, static_argnums=0)
        def apply(graph, state, x):
            return nnx.merge(graph, state)(x)

        out = apply(graph, state, x)
        assert out.dtype == (dtype or jnp.float32)
        assert module.query.kernel[...].dtype == param_dtype
        assert np.isfinite(out.astype(np.float32)).all()


PERFORMER_INIT = """
import jax, jax.numpy as jnp
from skyformer_jax.models import Classifier
model = Classifier(
    attention="performer", attention_options={"num_features": 256}, vocab_size=8, max_length=16,
    num_classes=2, num_layers=6, width=64, num_heads=2, head_dim=32, mlp_dim=64, dropout=0.0,
    pooling="mean",
)
tokens = jnp.ones((1, 16), jnp.uint8)
init = jax.jit(lambda key: model.init(key, tokens, tokens > 0))
jax.block_until_ready(init(jax.random.key(0)))
"""


def test_masks_of_modules_are_checked(batch):
    x, mask = batch
    linen = layers.MultiHeadAttention("softmax", HEADS, HEAD_DIM)  # options may be left out
    variables = linen.init(jax.random.key(0), x)
    of_nnx = nnx_layers.MultiHeadAttention("softmax", HEADS, WIDTH, HEAD_DIM, rngs=nnx.Rngs(0))
    for apply in (functools.partial(linen.apply, variables), of_nnx):
        np.testing.assert_array_equal(apply(x, mask=mask.tolist()), apply(x, mask=mask))
        for wrong in (mask[:, None, None], mask[:, :4], mask.astype(int)):
            with pytest.raises(ValueError, match=r"mask must be bool \[batch, kv_length\] = "):
                apply(x, mask=wrong)


@pytest.mark.parametrize("name", ["linformer", "performer"])
def test_variables_may_be_boxed(name, batch):
    """nn.with_partitioning and the metadata_params of nn.vmap and nn.scan box variables."""
    linen = layers.MultiHeadAttention(name, HEADS, HEAD_DIM, LAYER_OPTIONS.get(name, {}))
    variables = linen.init(jax.random.key(0), batch[0])
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), variables)
    found, expected = (linen.apply(v, batch[0]) for v in (boxed, variables))
    np.testing.assert_array_equal(found, expected)


def test_bigbirds_pattern_is_for_every_kind_of_random_key(batch):
    linen = layers.MultiHeadAttention("bigbird", HEADS, HEAD_DIM, SMALL["bigbird"])
    variables = linen.init(jax.random.key(0), batch[0])
    expected = linen.apply(variables, batch[0])
    with jax.default_prng_impl("rbg"):
        found = linen.apply(variables, batch[0])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_performers_start_does_not_hang():
    """Guards against jaxlib's batched QR on CPUs, which deadlocked on its own threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "-c", PERFORMER_INIT]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300)
