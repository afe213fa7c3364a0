"""Tiled softmax attention: float64 values, derivatives in all modes, masks and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from references import assert_directional_derivatives

from skyformer_jax.attention import softmax, softmax_attention

# q_length, kv_length, heads, kv_heads, value_dim; lengths at and around borders of 24 x 16 tiles.
SIZES = [
    (24, 16, 2, 2, 4),
    (25, 17, 2, 2, 3),
    (50, 70, 4, 2, 4),
    (70, 50, 4, 1, 5),
    (1, 40, 2, 2, 4),
    (40, 1, 2, 2, 4),
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Sets tiles of 24 x 16, so that short sequences have many."""
    monkeypatch.setattr(softmax, "_TILE", {"cpu": (24, 16), "default": (24, 16)})


chunked = functools.partial(softmax_attention, implementation="chunked")


def arrays(q_length, kv_length, heads=2, kv_heads=2, value_dim=4, *, seed=0, std=1.0):
    """Query, key, value and weights of the output."""
    rng = np.random.default_rng(seed)
    sizes = (
        (2, q_length, heads, 4),
        (2, kv_length, kv_heads, 4),
        (2, kv_length, kv_heads, value_dim),
        (2, q_length, heads, value_dim),
    )
    return [jnp.asarray(std * rng.normal(size=size), jnp.float32) for size in sizes]


def reference(query, key, value, allowed):
    """Softmax attention in float64; allowed is bool and broadcasts to the scores."""
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.where(allowed, q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e300))
    total = weights.sum(axis=-1, keepdims=True)
    return (weights / np.where(total, total, 1) @ v).swapaxes(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_float64(sizes, is_causal, small_tiles):
    """The mask leaves one query without keys, and hides one key, which is NaN, from all queries."""
    q_length, kv_length, heads, *_ = sizes
    rng = np.random.default_rng(1)
    mask = rng.random((2, heads, q_length, kv_length)) < 0.5
    mask[0, :, q_length // 2] = False
    mask[..., kv_length // 2] = False
    allowed = mask & np.tri(q_length, kv_length, dtype=bool) if is_causal else mask
    *qkv, weights = arrays(*sizes, std=2)
    junk = [x.at[:, kv_length // 2].set(jnp.nan) for x in qkv[1:]]

    @jax.jit
    def value_and_gradients(*qkv):
        def loss(*qkv):
            out = chunked(*qkv, full_mask=mask, is_causal=is_causal)
            return (out * weights).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)

    gradients, out = value_and_gradients(qkv[0], *junk)
    np.testing.assert_allclose(out, reference(*qkv, allowed), rtol=1e-5, atol=1e-5)
    assert not np.any(out[0, q_length // 2])
    assert not np.any(gradients[1][:, kv_length // 2])
    assert_directional_derivatives(
        gradients,
        lambda *qkv: (reference(*qkv, allowed) * np.asarray(weights)).sum(),
        qkv,
        rng,
        tolerance=1e-4,
    )


def test_scores_that_exponentials_cannot_hold(small_tiles):
    """Large scores of both signs: only the running maximum keeps the exponentials finite."""
    q, k, v, weights = arrays(40, 70)
    k = k * jnp.linspace(-400, 400, 70)[:, None, None]
    out, gradients = jax.jit(
        lambda *x: (chunked(*x), jax.grad(lambda *x: (chunked(*x) * weights).sum(), 2)(*x))
    )(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, True), rtol=1e-4, atol=1e-4)
    ones = jnp.ones_like(v)
    np.testing.assert_allclose(chunked(q, k, ones), jnp.ones_like(out), rtol=1e-5)
    assert np.isfinite(gradients).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, pytest.param({}, marks=pytest.mark.slow)],
    ids=["causal", "all"],
)
def test_modes_are_those_of_the_dense_form(options, small_tiles):
    """Forward, forward over reverse, reverse over forward and over reverse, with a traced scale."""
    (*x, weights), (*tangents, _) = arrays(40, 50, 4), arrays(40, 50, 4, seed=1)
    x, tangents = (*x, jnp.float32(0.6)), (*tangents, jnp.float32(0.3))

    def modes(implementation):
        def loss(q, k, v, scale):
            out = softmax_attention(q, k, v, scale=scale, implementation=implementation, **options)
            return (jnp.sin(out) * weights).sum()

        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))

        @jax.jit
        def all_modes(x, tangents):
            return (
                jax.jvp(loss, x, tangents),
                jax.jvp(gradient, x, tangents),
                jax.grad(lambda *x: jax.jvp(loss, x, tangents)[1], (0, 1, 3))(*x),
                jax.grad(lambda *x: sum((g**2).sum() for g in gradient(*x)), (0, 1, 2))(*x),
            )

        return all_modes(x, tangents)

    for mine, theirs in zip(
        *(jax.tree.leaves(modes(i)) for i in ("chunked", "dense")), strict=True
    ):
        assert np.linalg.norm(mine - theirs) <= 2e-5 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_mapped_rematerialised_and_scanned(small_tiles):
    """Checks vmap over the queries only, within a scan of rematerialized layers."""
    q, k, v, _ = arrays(40, 50)

    def gradient(attend):
        def loss(q):
            def layer(x, _):
                return jax.checkpoint(jax.vmap(lambda x: attend(x[None], k[:1], v[:1])[0]))(x), None

            return jnp.sin(jax.lax.scan(layer, q, length=2)[0]).sum()

        return jax.jit(jax.grad(loss))(q)

    expected = gradient(functools.partial(softmax_attention, implementation="dense"))
    np.testing.assert_allclose(gradient(chunked), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kv_heads", "query_spec", "key_spec"),
    [
        (2, P(None, None, "data"), P()),
        (1, P(None, None, "data"), P()),
        pytest.param(4, P("data"), P(), marks=pytest.mark.slow),
        pytest.param(2, P(None, None, "data"), P(None, None, "data"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_keys_divided_otherwise_than_queries(kv_heads, query_spec, key_spec, small_tiles):
    """Uses an explicit mesh axis, which may divide heads but not kv_heads."""
    *qkv, weights = arrays(40, 50, 4, kv_heads)
    mask = jnp.arange(50)[None] < jnp.asarray([[30], [50]])

    @jax.jit
    def gradients(mask, *qkv):
        def loss(*qkv):
            return (jnp.sin(chunked(*qkv, mask=mask)) * weights).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    specs = (P(), query_spec, key_spec, key_spec)
    on_mesh = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((mask, *qkv), specs, strict=True)
    ]
    found = gradients(*on_mesh)
    for mine, expected, spec in zip(found, gradients(mask, *qkv), specs[1:], strict=True):
        assert mine.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_is_linear_and_the_keys_are_not_repeated():
    def temporaries(length, kv_heads=2):
        shapes = [
            jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (2, kv_heads)
        ]

        def gradients(q, k):
            loss = lambda q, k: softmax_attention(q, k, k, is_causal=True).sum()  # noqa: E731
            return jax.grad(loss, argnums=(0, 1))(q, k)

        program = jax.jit(gradients).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporaries(4096), temporaries(65536)
    assert many < 16 * few
    assert few < 24e6
    assert temporaries(65536, kv_heads=1) < many
