"""Explicit mesh axes, jax.make_mesh's default: outputs are sharded as the inputs are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from grids import by_default
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import RANDOM, SMALL, call, inputs, masks
from test_model import tiny_config

import skyformer_jax
from skyformer_jax import attention, layers, models, nnx_layers

QUICK = ("softmax", "skyformer")
quick_attentions = by_default(*QUICK)
CASES = [pytest.param(name, SMALL.get(name, {}), id=name) for name in attention.NAMES]
CASES += [
    pytest.param("kernelized", {"implementation": "chunked"}, id="chunked"),
    *(
        pytest.param(
            "skyformer", {"num_landmarks": 8, **options}, id="-".join(options.values()), marks=marks
        )
        for options, marks in (
            ({"landmarks": "segment_means"}, ()),
            ({"landmarks": "kmeans++"}, pytest.mark.slow),
            ({"landmarks": "leverage", "inverse": "cholesky"}, ()),
        )
    ),
    pytest.param(
        "nystromformer", {"num_landmarks": 6, "conv_kernel": np.ones((3, 2), np.float32)}, id="conv"
    ),
    pytest.param(
        "skyformer",
        {
            "landmarks": np.arange(64, dtype=np.float32).reshape(4, 2, 8) / 64,
            "normalize": True,
            "conv_kernel": np.ones((3, 2, 8), np.float32),
        },
        id="learned",
    ),
]


def explicit_mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])


@pytest.mark.parametrize("axis", ["batch", "heads"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_attentions_keep_the_sharding(name, options, axis):
    """Checks values and gradients with the batch or the heads sharded."""
    arrays, mask = inputs(11, 11, batch=4), masks(4, 11)
    rng = jax.random.key(3) if name in RANDOM else None

    @jax.jit
    def value_and_gradients(q, k, v, mask):
        def loss(q, k, v):
            out = call(name, q, k, v, mask=mask, rng=rng, **options)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    expected = value_and_gradients(*arrays, mask)
    mesh = explicit_mesh()
    spec, mask_spec = {"batch": (P("data"), P("data")), "heads": (P(None, None, "data"), P())}[axis]
    sharding = NamedSharding(mesh, spec)
    sharded = [jax.device_put(x, sharding) for x in arrays]
    found = value_and_gradients(*sharded, jax.device_put(mask, NamedSharding(mesh, mask_spec)))
    out = found[0][1]
    assert out.sharding.is_equivalent_to(sharding, out.ndim)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("spec", [P(None, "data"), P(None, None, None, "data")], ids=str)
@pytest.mark.parametrize("name", ["kernelized", "skyformer"])
def test_a_divided_sequence_or_head_dim(name, spec):
    """Works with a sharded sequence or head_dim, though kernels only know batch and heads."""
    arrays, mask = inputs(12, 12, head_dim=4), masks(3, 12)

    @jax.jit
    def gradients(*arrays):
        def loss(q, k, v):
            out = call(name, q, k, v, mask=mask, **SMALL.get(name, {}))
            return jnp.sin(out).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    sharding = NamedSharding(explicit_mesh(), spec)
    found = gradients(*(jax.device_put(x, sharding) for x in arrays))
    assert found[1].sharding.is_equivalent_to(sharding, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        gradients(*arrays),
    )


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=str)
def test_lengths_that_kernels_are_for(spec):
    """Above 128 x 128 scores, each device's shard would go to a kernel on an accelerator."""
    arrays = inputs(160, 160, batch=2, head_dim=4)[:3]
    mesh = explicit_mesh()

    @jax.jit
    def gradients(*arrays):
        def loss(q, k, v):
            out = attention.kernelized_attention(q, k, v)
            return jnp.sin(out).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    sharding = NamedSharding(mesh, spec)
    found = gradients(*(jax.device_put(x, sharding) for x in arrays))
    assert found[1].sharding.is_equivalent_to(sharding, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found,
        gradients(*arrays),
    )


@quick_attentions
def test_modules_keep_the_sharding(name):
    """Checks our linen and NNX layers, and Flax's own with attention_fn and a mask."""
    options = SMALL.get(name, {})
    x, mask = inputs(12, 12, batch=4, heads=1)[0][:, :, 0], masks(4, 12)
    ours = layers.MultiHeadAttention(name, 2, 4, options)
    flax = nn.MultiHeadAttention(2, attention_fn=skyformer_jax.attention_fn(name, **options))
    sharding = NamedSharding(explicit_mesh(), P("data"))
    for module, mask_of in ((ours, lambda mask: mask), (flax, lambda mask: mask[:, None, None])):
        variables = module.init(jax.random.key(0), x)

        @jax.jit
        def apply(x, mask, module=module, mask_of=mask_of, variables=variables):
            return module.apply(variables, x, mask=mask_of(mask))

        out = apply(*(jax.device_put(array, sharding) for array in (x, mask)))
        assert out.sharding.is_equivalent_to(sharding, out.ndim)
        np.testing.assert_allclose(out, apply(x, mask), rtol=1e-4, atol=1e-5)
    of_nnx = nnx_layers.MultiHeadAttention(
        name, 2, 8, 4, options=options, max_length=12, rngs=nnx.Rngs(0)
    )
    apply = nnx.jit(lambda module, x, mask: module(x, mask=mask))
    out = apply(of_nnx, *(jax.device_put(array, sharding) for array in (x, mask)))
    assert out.sharding.is_equivalent_to(sharding, out.ndim)
    np.testing.assert_allclose(out, apply(of_nnx, x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("skyformer", {"num_documents": 2, "ngrams": (2, 3)}),
        pytest.param(
            "softmax", {"remat": True, "dropout": 0.1, "pooling": "cls"}, marks=pytest.mark.slow
        ),
        *(
            pytest.param(name, {"remat": remat}, marks=pytest.mark.slow)
            for name in attention.NAMES
            for remat in (False, True)
        ),
    ],
)
def test_models_keep_the_sharding(name, settings):
    """Checks logits, statistics and gradients for one and two documents, dropout and remat."""
    sharding = NamedSharding(explicit_mesh(), P("data"))
    config = tiny_config(name, num_layers=1, **settings)
    model = models.build_model(config)
    shape = (4, 2, 48) if "num_documents" in settings else (4, 48)
    tokens = np.random.default_rng(0).integers(0, 15, shape).astype(np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, tokens > 0)
    rngs = {s: jax.random.key(1) for s in ("dropout", "landmarks")}

    @jax.jit
    def loss(params, tokens, mask, variables=variables, model=model, rngs=rngs):
        logits, sown = model.apply(
            {**variables, "params": params},
            tokens,
            mask,
            deterministic=False,
            rngs=rngs,
            mutable=["statistics"],
        )
        return jnp.sin(logits).sum(), (logits, sown["statistics"]["mean_square"])

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = gradients(variables["params"], tokens, tokens > 0)
    arrays = [jax.device_put(x, sharding) for x in (tokens, tokens > 0)]
    on_mesh = jax.device_put(variables["params"], NamedSharding(sharding.mesh, P()))
    found = gradients(on_mesh, *arrays)
    assert found[0][1][0].sharding.is_equivalent_to(sharding, 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )
