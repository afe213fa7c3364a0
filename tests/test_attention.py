"""The contract that every attention fulfils, as one test suite for all of them."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import by_default
from references import REFERENCES, assert_directional_derivatives

from skyformer_jax import attention
from skyformer_jax.attention.registry import COMMON_OPTIONS

all_attentions = pytest.mark.parametrize("name", attention.NAMES)
QUICK = ("softmax", "kernelized", "skyformer", "reformer")
quick_attentions = by_default(*QUICK)
exact_attentions = pytest.mark.parametrize("name", sorted(REFERENCES))


# Small enough that the methods really approximate at the sequence lengths of these tests.
SMALL = {
    "skyformer": {"num_landmarks": 8},
    "nystromformer": {"num_landmarks": 6},
    "linformer": {"num_features": 6},
    "informer": {"num_active_queries": 4, "num_sampled_keys": 5},
    "performer": {"num_features": 16},
    "reformer": {"chunk_length": 4},
    "bigbird": {"block_size": 2, "num_global_blocks": 1, "num_random_blocks": 1},
}
SELF_ONLY = tuple(n for n, entry in attention.REGISTRY.items() if entry.self_attention_only)
RANDOM = tuple(n for n, entry in attention.REGISTRY.items() if entry.stream)


def call(name, query, key, value, **options):
    """Calls an attention, with key=None for reformer, whose query is also its key."""
    key = None if attention.REGISTRY[name].shared_query_key else key
    return attention.ATTENTIONS[name](query, key, value, **options)


@functools.cache
def jitted(name, **options):
    """Returns a cached jitted attention: one compilation per shape instead of one per operation."""
    return jax.jit(functools.partial(call, name, **options))


def small(name):
    return jitted(name, **SMALL.get(name, {}))


def inputs(q_length, kv_length, *, batch=3, heads=2, head_dim=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, heads, head_dim) for n in (q_length, kv_length, kv_length)]
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def masks(batch, length, seed=1):
    """Masks with a random pattern, with padding at the end, and with no real key at all."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, length)) < 0.6
    mask[:, 0] = True
    mask[1] = np.arange(length) < max(1, length // 2)
    mask[-1] = False
    return mask


@exact_attentions
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (5, 13), (13, 5), (1031, 523)])
def test_equals_float64_reference(name, lengths):
    q, k, v = inputs(*lengths)
    mask = masks(3, lengths[1])
    for m in (None, mask):
        for scale in (None, 0.7):
            out = jitted(name, scale=scale)(q, k, v, mask=m)
            expected = REFERENCES[name](q, k, v, m, scale)
            np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


@exact_attentions
@pytest.mark.parametrize("length", [6, 600])
def test_gradients_by_finite_differences_of_the_reference(name, length):
    """Compares directional derivatives with central differences of the float64 reference."""
    q, k, v = inputs(length, length, batch=2, head_dim=4)
    mask = masks(2, length)
    rng = np.random.default_rng(5)
    weights = rng.normal(size=q.shape)

    def loss(q, k, v):
        return (jitted(name)(q, k, v, mask=mask) * weights).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert_directional_derivatives(
        gradients,
        lambda *args: (REFERENCES[name](*args, mask) * weights).sum(),
        (q, k, v),
        rng,
        tolerance=1e-3,
    )


@all_attentions
@pytest.mark.parametrize("with_rng", [False, True])
def test_padding_is_invisible_to_values_and_gradients(name, with_rng):
    """Masked keys and values, even NaN, never affect real positions or gradients.

    For reformer this includes masked queries, since they are its keys.
    """
    q, k, v = inputs(11, 11)
    mask = masks(3, 11)
    rng = jax.random.key(3) if with_rng else None
    real = mask[:, :, None, None]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(q, k, v):
        out = call(name, q, k, v, mask=mask, rng=rng, **SMALL.get(name, {}))
        return jnp.where(real, jnp.sin(out), 0).sum(), out

    (_, clean), clean_gradients = loss(q, k, v)
    assert np.abs(np.where(real, clean, 0)).max() > 0.1
    assert not np.any(np.asarray(clean_gradients[1]) * ~real)
    assert not np.any(np.asarray(clean_gradients[2]) * ~real)
    for junk in (np.nan, np.inf, -1e30):
        query = np.where(real, q, junk) if name == "reformer" else q
        (_, dirty), dirty_gradients = loss(query, np.where(real, k, junk), np.where(real, v, junk))
        np.testing.assert_array_equal(np.where(real, dirty, 0), np.where(real, clean, 0))
        for a, b in zip(dirty_gradients, clean_gradients, strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)


@all_attentions
def test_queries_at_padding_touch_only_their_own_rows(name):
    q, k, v = inputs(11, 11)
    mask = masks(3, 11)
    real = mask[:, :, None, None]
    for rng in (None, jax.random.key(0)):
        clean = small(name)(q, k, v, mask=mask, rng=rng)
        dirty = small(name)(np.where(real, q, np.nan), k, v, mask=mask, rng=rng)
        np.testing.assert_array_equal(np.where(real, dirty, 0), np.where(real, clean, 0))


@all_attentions
def test_no_real_key_gives_zeros(name):
    q, k, v = inputs(9, 9)
    mask = np.zeros((3, 9), bool)
    loss = jax.value_and_grad(lambda q: (small(name)(q, k, v, mask=mask) ** 2).sum())
    value, gradient = jax.jit(loss)(q)
    assert value == 0
    assert not np.any(gradient)


@all_attentions
@pytest.mark.parametrize("with_rng", [False, True])
def test_examples_do_not_influence_each_other(name, with_rng):
    q, k, v = inputs(40, 40, batch=4)
    mask = masks(4, 40)
    rng = jax.random.key(7) if with_rng else None
    together = np.asarray(small(name)(q, k, v, mask=mask, rng=rng))
    for rows in (slice(0, 1), slice(1, 2), slice(3, 4)):
        alone = small(name)(q[rows], k[rows], v[rows], mask=mask[rows], rng=rng)
        np.testing.assert_allclose(alone, together[rows], rtol=1e-5, atol=1e-5)
    k[2], v[2] = 1e4, 1e4
    huge = np.asarray(small(name)(q, k, v, mask=mask, rng=rng))
    np.testing.assert_allclose(huge[:2], together[:2], rtol=1e-5, atol=1e-5)


@all_attentions
@pytest.mark.parametrize(
    "length", [1, 3, 513, 2003, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 17, 127))]
)
def test_any_length(name, length):
    """Uses the paper's options, such as landmark counts, that exceed the shorter lengths."""
    q, k, v = inputs(length, length, batch=1, head_dim=(8, 33, 128)[length % 3])
    out = jitted(name)(q, k, v, mask=np.arange(length)[None] < max(1, 2 * length // 3))
    assert out.shape == q.shape
    assert np.isfinite(out).all()


@all_attentions
@pytest.mark.parametrize("lengths", [(5, 12), (12, 5)])
def test_cross_attention(name, lengths):
    q, k, v = inputs(*lengths, head_dim=16)
    mask = masks(3, lengths[1])
    if name in SELF_ONLY:
        with pytest.raises(ValueError, match=r"itself|one shape|agree"):
            attention.ATTENTIONS[name](q, k if name != "reformer" else q, v, mask=mask)
        return
    clean = small(name)(q, k, v, mask=mask)
    assert clean.shape == q.shape
    junk = np.where(mask[:, :, None, None], 0, np.nan).astype(np.float32)
    np.testing.assert_array_equal(small(name)(q, k + junk, v + junk, mask=mask), clean)


@all_attentions
def test_bfloat16_in_and_out(name):
    q, k, v = inputs(64, 64, dtype=jnp.bfloat16)
    mask = masks(3, 64)
    out = small(name)(q, k, v, mask=mask)
    assert out.dtype == jnp.bfloat16
    wide = np.asarray(small(name)(*(x.astype(np.float32) for x in (q, k, v)), mask=mask))
    scale = np.abs(wide).max()
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[mask], wide[mask], rtol=0.02, atol=0.01 * scale
    )


@all_attentions
def test_float16_and_mixed_dtypes(name):
    """The output has the dtype of value, regardless of the dtypes of query and key."""
    q, k, v = inputs(10, 10)
    out = small(name)(q.astype(jnp.float16), k.astype(jnp.float16), v.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()


@quick_attentions
def test_transformations(name):
    """jit, vmap, remat and forward mode agree with the plain call and its gradient."""
    q, k, v = inputs(30, 30)
    mask = masks(3, 30)
    plain = call(name, q, k, v, mask=mask, **SMALL.get(name, {}))
    np.testing.assert_allclose(small(name)(q, k, v, mask=mask), plain, rtol=1e-5, atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda q, k, v, m: small(name)(q, k, v, mask=m)))(
        *(x[:, None] for x in (q, k, v, mask))
    )
    np.testing.assert_allclose(np.asarray(mapped)[:, 0], plain, rtol=1e-5, atol=1e-5)

    def loss(q):
        return small(name)(q, k, v, mask=mask).sum()

    gradient, remat, tangent = jax.jit(
        lambda q: (
            jax.grad(loss)(q),
            jax.grad(jax.checkpoint(loss))(q),
            jax.jvp(loss, (q,), (jnp.ones_like(q),))[1],
        )
    )(q)
    np.testing.assert_allclose(remat, gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tangent, np.sum(gradient), rtol=1e-3, atol=1e-3)


@all_attentions
def test_random_only_where_given_an_rng(name):
    q, k, v = inputs(50, 50)
    first = small(name)(q, k, v)
    np.testing.assert_array_equal(small(name)(q, k, v), first)
    draws = [np.asarray(small(name)(q, k, v, rng=jax.random.key(i))) for i in (1, 2)]
    assert np.any(draws[0] != draws[1]) == (name in RANDOM)
    np.testing.assert_array_equal(small(name)(q, k, v, rng=jax.random.key(1)), draws[0])


@all_attentions
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda q, k, v: (q[0], k, v, None), "batch, length, heads, head_dim"),
        (lambda q, k, v: (q, k, v[:, 1:], None), "agree in batch"),
        (lambda q, k, v: (q[:2], k, v, None), "agree in batch"),
        (lambda q, k, v: (q[:, :, :1], k, v, None), "a multiple of them; got 1 and 2"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v, None), "head_dim of query and key must be"),
        (lambda q, k, v: (q, k, v, np.ones((3, 9))), "bool"),
        (lambda q, k, v: (q, k, v, np.ones((3, 1, 1, 9), bool)), "kv_length"),
    ],
)
def test_bad_shapes_are_refused(name, bad, message):
    *arrays, mask = bad(*inputs(9, 9))
    with pytest.raises(ValueError, match=message):
        small(name)(*arrays, mask=mask)


@quick_attentions
def test_fewer_heads_of_keys_and_values_are_shared(name):
    """Key and value heads act as if repeated for the query heads, also with another value_dim."""
    q, k, v = inputs(11, 11, heads=4)
    k, v = k[:, :, ::2], np.concatenate([v, v], axis=-1)[:, :, ::2, :13]
    mask = masks(3, 11)

    @jax.jit
    def shared(q, k, v):
        return call(name, q, k, v, mask=mask, **SMALL.get(name, {}))

    @jax.jit
    def repeated(q, k, v):
        return shared(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))

    found, expected = (
        jax.jit(jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2)))(q, k, v)  # noqa: B023
        for f in (shared, repeated)
    )
    assert shared(q, k, v).shape == (3, 11, 4, 13)
    np.testing.assert_allclose(shared(q, k, v), repeated(q, k, v), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@exact_attentions
def test_value_dim_differs_from_head_dim(name):
    """Compares with float64; the two lengths use the dense and the tiled form of kernelized."""
    for length, value_dim in ((9, 5), (300, 13)):
        q, k, v = inputs(length, length)
        v = np.concatenate([v, v], axis=-1)[..., :value_dim]
        expected = [REFERENCES[name](q, k, v[..., i : i + 1].repeat(8, -1)) for i in (0, 4)]
        out = np.asarray(jitted(name)(q, k, v))
        for i, of_feature in zip((0, 4), expected, strict=True):
            np.testing.assert_allclose(out[..., i], of_feature[..., 0], rtol=2e-5, atol=2e-5)


@all_attentions
@pytest.mark.parametrize("lengths", [(0, 5, 5), (2, 0, 0), (2, 3, 0), (2, 0, 3)])
def test_empty_arrays_give_zeros(name, lengths):
    batch, q_length, kv_length = lengths
    q, k, v = inputs(q_length, kv_length, batch=batch)
    function = functools.partial(jitted(name), mask=np.ones((batch, kv_length), bool))
    if name in SELF_ONLY and q_length != kv_length:
        with pytest.raises(ValueError, match=r"itself|agree"):
            function(q, k, v)
        return
    out = function(q, k, v[..., :3])
    assert out.shape == (batch, q_length, 2, 3)
    gradients = jax.jit(jax.grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert not any(np.any(x) for x in (out, *gradients))


@quick_attentions
def test_scale_and_gamma_may_be_learned(name):
    """Traced scale and gamma have gradients that agree with central differences."""
    q, k, v = inputs(11, 11)
    mask = masks(3, 11)
    options = {"scale": 0.5, **({"gamma": 0.3} if name == "skyformer" else {})}

    @jax.jit
    def loss(options):
        out = call(name, q, k, v, mask=mask, **{**SMALL.get(name, {}), **options})
        return jnp.sin(out).sum()

    gradients = jax.jit(jax.grad(loss))(options)
    plain = jitted(name, **SMALL.get(name, {}), **options)(q, k, v, mask=mask)
    np.testing.assert_allclose(loss(options), np.sin(plain).sum(), rtol=1e-4, atol=1e-4)
    for option, value in options.items():
        above, below = (loss({**options, option: value + step}) for step in (0.01, -0.01))
        np.testing.assert_allclose(gradients[option], (above - below) / 0.02, rtol=2e-2, atol=1e-2)
        with pytest.raises(ValueError, match=f"{option} must be one number; got an array of shape"):
            call(name, q, k, v, **{option: np.ones(2)})


@all_attentions
def test_arguments_of_numpy_and_numbers_of_any_kind(name):
    """float64 NumPy arrays, lists and NumPy scalars work; integer arrays are refused.

    Integer arrays would round the result to integers. Options that count something must be
    integers.
    """
    doubles = [np.asarray(x, np.float64) for x in inputs(11, 11)]
    options = {**SMALL.get(name, {}), "mask": np.ones((3, 11), bool).tolist()}
    with warnings.catch_warnings(action="error"):
        out = jax.eval_shape(lambda: call(name, *doubles, scale=np.float64(0.3), **options))
    assert out.dtype == jnp.float32
    with pytest.raises(TypeError, match=r"arrays of floating numbers; got int32"):
        call(name, *[jnp.ones((3, 11, 2, 5), jnp.int32)] * 3)
    with pytest.raises(TypeError, match="scale must be a number; got 'a'"):
        call(name, *doubles, scale="a")
    integers = [k for k, v in attention.default_options(name).items() if type(v) is int]
    for option in set(integers) & inspect.signature(attention.ATTENTIONS[name]).parameters.keys():
        with pytest.raises(TypeError, match=f"{option} must be an integer.*; got 4.0"):
            call(name, *doubles, **{option: 4.0})
    if name in ("kernelized", "skyformer", "performer"):
        with pytest.raises(ValueError, match=r"scale must not be negative; got -0\.5"):
            call(name, *doubles, scale=-0.5)


def test_gamma_and_indices_that_are_known_within_jit():
    arrays = inputs(11, 11)

    def shape(**options):
        return jax.eval_shape(lambda: call("skyformer", *arrays, **options)).shape

    assert shape(gamma=jnp.float32(0.2), landmark_indices=[[0, 3]] * 3) == (3, 11, 2, 8)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        shape(gamma=jnp.float32(-0.2))
    for indices in (jnp.arange(3), jnp.ones((2, 3), int), jnp.ones((3, 3))):
        with pytest.raises(ValueError, match=r"landmark_indices must be int \[batch = 3, "):
            shape(landmark_indices=indices)


@all_attentions
def test_unknown_options_are_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} has no option 'landmark'; it has: "):
        attention.check_options(name, {"landmark": 1})
    attention.check_options(name, attention.default_options(name))


@all_attentions
def test_the_registry_says_what_the_function_takes(name):
    """The registry's options, defaults, masks and axis_name match the functions' signatures."""
    entry = attention.REGISTRY[name]
    arguments = inspect.signature(entry.function).parameters
    said = {**COMMON_OPTIONS, **entry.options}
    for option, default in said.items():
        assert arguments[option].default == default
    called = {"query", "key", "value", *entry.masks, *(("axis_name",) if entry.splittable else ())}
    assert set(arguments) == called | set(said)
    arguments = inspect.signature(entry.variables).parameters
    assert {k: v.default for k, v in arguments.items() if k in entry.variable_options} == (
        entry.variable_options
    )
    assert set(arguments) == {
        "num_heads",
        "head_dim",
        "value_dim",
        "kv_length",
        *entry.variable_options,
    }
    q, k, v = inputs(6, 5)
    if entry.self_attention_only and not entry.shared_query_key:
        with pytest.raises(ValueError, match="itself"):
            call(name, q, k, v)
