"""The contract of every attention, one suite for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import REFERENCES, assert_directional_derivatives

from skyformer_jax import attention

all_attentions = pytest.mark.parametrize("name", attention.NAMES)
exact_attentions = pytest.mark.parametrize("name", sorted(REFERENCES))


@functools.cache
def jitted(name, **options):
    """One compilation for each shape, where op by op there would be dozens."""
    return jax.jit(functools.partial(attention.ATTENTIONS[name], **options))


def inputs(q_length, kv_length, *, batch=3, heads=2, head_dim=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, heads, head_dim) for n in (q_length, kv_length, kv_length)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def masks(batch, length, seed=1):
    """A random pattern, a suffix of padding, and an example without any real key."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, length)) < 0.6
    mask[:, 0] = True
    mask[1] = np.arange(length) < max(1, length // 2)
    mask[-1] = False
    return jnp.asarray(mask)


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
    """Directional derivatives against central differences of the float64 reference."""
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
@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("with_rng", [False, True])
def test_padding_is_invisible_to_values_and_gradients(name, junk, with_rng):
    q, k, v = inputs(11, 11)
    mask = masks(3, 11)
    rng = jax.random.key(3) if with_rng else None
    real = mask[:, :, None, None]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(q, k, v):
        out = jitted(name)(q, k, v, mask=mask, rng=rng)
        return jnp.where(real, jnp.sin(out), 0).sum(), out

    (_, clean), clean_gradients = loss(q, k, v)
    (_, dirty), dirty_gradients = loss(q, jnp.where(real, k, junk), jnp.where(real, v, junk))
    np.testing.assert_array_equal(np.where(real, dirty, 0), np.where(real, clean, 0))
    for a, b in zip(dirty_gradients, clean_gradients, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    assert not np.any(clean_gradients[1] * ~real)
    assert not np.any(clean_gradients[2] * ~real)


@all_attentions
def test_queries_at_padding_touch_only_their_own_rows(name):
    q, k, v = inputs(11, 11)
    mask = masks(3, 11)
    real = mask[:, :, None, None]
    for rng in (None, jax.random.key(0)):
        clean = jitted(name)(q, k, v, mask=mask, rng=rng)
        dirty = jitted(name)(jnp.where(real, q, jnp.nan), k, v, mask=mask, rng=rng)
        np.testing.assert_array_equal(np.where(real, dirty, 0), np.where(real, clean, 0))


@all_attentions
def test_no_real_key_gives_zeros(name):
    q, k, v = inputs(5, 9)
    mask = jnp.zeros((3, 9), bool)
    assert not np.any(jitted(name)(q, k, v, mask=mask))
    gradient = jax.grad(lambda q: jitted(name)(q, k, v, mask=mask).sum())(q)
    assert not np.any(gradient)


@all_attentions
@pytest.mark.parametrize("with_rng", [False, True])
def test_examples_do_not_influence_each_other(name, with_rng):
    q, k, v = inputs(40, 40, batch=4)
    mask = masks(4, 40)
    rng = jax.random.key(7) if with_rng else None
    call = functools.partial(jitted(name), rng=rng)
    together = call(q, k, v, mask=mask)
    for i in (0, 1, 3):
        rows = slice(i, i + 1)
        alone = call(q[rows], k[rows], v[rows], mask=mask[rows])
        np.testing.assert_allclose(alone, together[rows], rtol=1e-5, atol=1e-5)
    huge = call(q, k.at[2].set(1e4), v.at[2].set(1e4), mask=mask)
    np.testing.assert_allclose(huge[:2], together[:2], rtol=1e-5, atol=1e-5)


@all_attentions
@pytest.mark.parametrize("length", [1, 2, 3, 17, 127, 513, 2003])
def test_any_length(name, length):
    q, k, v = inputs(length, length, batch=1)
    out = jitted(name)(q, k, v)
    assert out.shape == q.shape
    assert np.isfinite(out).all()


@all_attentions
@pytest.mark.parametrize("head_dim", [8, 33, 128])
@pytest.mark.parametrize("lengths", [(5, 12), (12, 5)])
def test_cross_attention_and_head_dims(name, head_dim, lengths):
    q, k, v = inputs(*lengths, head_dim=head_dim)
    out = jitted(name)(q, k, v, mask=masks(3, lengths[1]))
    assert out.shape == q.shape
    assert np.isfinite(out).all()


@all_attentions
def test_bfloat16_in_and_out(name):
    q, k, v = inputs(64, 64, dtype=jnp.bfloat16)
    mask = masks(3, 64)
    out = jitted(name)(q, k, v, mask=mask)
    assert out.dtype == jnp.bfloat16
    wide = jitted(name)(*(x.astype(jnp.float32) for x in (q, k, v)), mask=mask)
    scale = np.abs(wide).max()
    np.testing.assert_allclose(out.astype(np.float32), wide, rtol=0.02, atol=0.01 * scale)


@all_attentions
def test_transformations(name):
    """jit, vmap, remat and forward mode give what the plain call gives."""
    q, k, v = inputs(30, 30)
    mask = masks(3, 30)
    call = functools.partial(attention.ATTENTIONS[name], mask=mask)
    plain = call(q, k, v)
    np.testing.assert_allclose(jax.jit(call)(q, k, v), plain, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda q, k, v, m: jitted(name)(q, k, v, mask=m))(
        *(x[:, None] for x in (q, k, v, mask))
    )
    np.testing.assert_allclose(mapped[:, 0], plain, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda q: call(q, k, v).sum())(q)
    remat = jax.grad(lambda q: jax.checkpoint(call)(q, k, v).sum())(q)
    np.testing.assert_allclose(remat, gradient, rtol=1e-4, atol=1e-5)
    _, tangent = jax.jvp(lambda q: call(q, k, v).sum(), (q,), (jnp.ones_like(q),))
    np.testing.assert_allclose(tangent, gradient.sum(), rtol=1e-3, atol=1e-3)


@all_attentions
def test_deterministic_without_rng(name):
    q, k, v = inputs(200, 200)
    np.testing.assert_array_equal(jitted(name)(q, k, v), jitted(name)(q, k, v))


@all_attentions
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda q, k, v: (q[0], k, v, None), "batch, length, heads, head_dim"),
        (lambda q, k, v: (q, k, v[:, 1:], None), "one shape"),
        (lambda q, k, v: (q[..., :4], k, v, None), "head_dim"),
        (lambda q, k, v: (q[:2], k, v, None), "batch"),
        (lambda q, k, v: (q, k, v, jnp.ones((3, 9))), "bool"),
        (lambda q, k, v: (q, k, v, jnp.ones((3, 1, 1, 9), bool)), "kv_length"),
    ],
)
def test_bad_shapes_are_refused(name, bad, message):
    *arrays, mask = bad(*inputs(9, 9))
    with pytest.raises(ValueError, match=message):
        jitted(name)(*arrays, mask=mask)
