"""Forward-mode and higher-order derivatives, in the dense and the tiled forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import by_default
from jax.sharding import PartitionSpec as P
from references import gaussian_kernel
from test_attention import SMALL, call

from skyformer_jax.attention import gaussian, kernelized_attention
from skyformer_jax.attention.gaussian import gaussian_attention

# One length below and one above the limit up to which the dense form is used.
LENGTHS = (12, 150)


def normal(seed, *sizes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)


def inputs(q_length, kv_length, seed=0):
    sizes = [(2, n, 2, 4) for n in (q_length, kv_length, kv_length)]
    return (*normal(seed, *sizes), jnp.float32(0.6 - 0.3 * seed))


def losses(implementation):
    """A loss of query, key, value and scale, its gradient, and the gradient's squared norm."""
    (weights,) = normal(5, (2, 40, 2, 4))

    def loss(*arrays):
        *qkv, scale = arrays
        out = gaussian_attention(*qkv, scale=scale, implementation=implementation)
        return (jnp.sin(out) * weights).sum()

    def gradient(*arrays):
        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    def squared_gradient(*arrays):
        return sum((g**2).sum() for g in gradient(*arrays))

    return loss, gradient, squared_gradient


MODES = {
    "forward": lambda loss, gradient, _: lambda x, t: jax.jvp(loss, x, t),
    "forward over reverse": lambda loss, gradient, _: lambda x, t: jax.jvp(gradient, x, t),
    "reverse over reverse": lambda loss, gradient, square: lambda x, t: jax.grad(square, 1)(*x),
    "reverse over forward": lambda loss, gradient, _: (
        lambda x, t: jax.grad(lambda *x: jax.jvp(loss, x, t)[1], (0, 2))(*x)
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("implementation", "tolerance"),
    [("chunked", 5e-6), pytest.param("pallas", 5e-3, marks=pytest.mark.slow)],
)
def test_modes_are_those_of_the_dense_form(mode, implementation, tolerance, monkeypatch):
    monkeypatch.setattr(gaussian, "_TILE", {"cpu": (24, 16), "default": (24, 16)})
    x, tangents = inputs(40, 70), inputs(40, 70, seed=1)
    found = jax.jit(MODES[mode](*losses(implementation)))(x, tangents)
    expected = jax.jit(MODES[mode](*losses("dense")))(x, tangents)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("length", LENGTHS)
@by_default("kernelized", "skyformer")
def test_forward_mode_agrees_with_reverse_mode(name, length):
    """Checks u . (J t) = (J^T u) . t, and Hessian products in both orders of the modes."""
    sizes = ((2, length, 2, 4),) * 3
    x, tangents = normal(0, *sizes), normal(1, *sizes)
    (weights,) = normal(2, sizes[0])

    def loss(*x):
        return (jnp.sin(call(name, *x, **SMALL.get(name, {}))) * weights).sum()

    def dot(a, b):
        return sum((p * q).sum() for p, q in zip(a, b, strict=True))

    @jax.jit
    def products(x, tangents):
        gradient = jax.grad(loss, argnums=(0, 1, 2))
        forward = jax.jvp(loss, x, tangents)[1]
        over_reverse = jax.jvp(gradient, x, tangents)[1]
        over_forward = jax.grad(lambda *x: jax.jvp(loss, x, tangents)[1], argnums=(0, 1, 2))(*x)
        return (forward, dot(over_reverse, tangents)), (
            dot(gradient(*x), tangents),
            dot(over_forward, tangents),
        )

    found, expected = products(x, tangents)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert found[0] != 0


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_second_derivatives_where_points_coincide(implementation):
    """Where a query equals a key, the exponent is 0 up to rounding and curvature is largest."""
    points, _, value, _ = inputs(9, 9)
    scale = 0.6

    def out(direction):
        query = points + direction * jnp.ones_like(points)
        return gaussian_attention(query, points, value, scale=scale, implementation=implementation)

    second = jax.jacfwd(jax.jacfwd(out))(0.0)
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (points, points, value))
    along = (q[..., :, None, :] - k[..., None, :, :]).sum(-1)
    kernel = np.array(
        [[gaussian_kernel(q[b, h], k[b, h], scale) for h in range(2)] for b in range(2)]
    )
    expected = kernel * ((scale * along) ** 2 - scale * q.shape[-1]) @ v
    np.testing.assert_allclose(second, expected.swapaxes(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_forward_mode_of_a_split_sequence(implementation):
    """Forward, and forward over reverse, with keys and values that circulate in a ring."""
    sizes = ((2, 16, 2, 4),) * 3
    x, tangents = normal(0, *sizes), normal(1, *sizes)

    def products(axis_name):
        def loss(*qkv):
            out = kernelized_attention(*qkv, implementation=implementation, axis_name=axis_name)
            return (out**2).sum()

        def both(x, tangents):
            gradient = jax.grad(loss, argnums=(0, 1, 2))
            forward = jax.jvp(lambda *x: loss(*x)[None], x, tangents)[1]
            return forward, jax.jvp(gradient, x, tangents)[1]

        return both

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("seq",))
    along = P(None, "seq")
    split = jax.shard_map(
        products("seq"), mesh=mesh, in_specs=along, out_specs=(P("seq"), along), check_vma=False
    )
    forward, over_reverse = jax.jit(split)(x, tangents)
    expected_forward, expected = jax.jit(products(None))(x, tangents)
    np.testing.assert_allclose(forward.sum(), expected_forward.sum(), rtol=1e-4)
    for mine, theirs in zip(over_reverse, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_memory_of_forward_over_reverse_is_linear():
    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

        def product(*x):
            gradient = jax.grad(lambda *x: (kernelized_attention(*x) ** 2).sum(), (0, 1, 2))
            return jax.jvp(gradient, x, x)

        return jax.jit(product).lower(shape, shape, shape).compile().memory_analysis()

    few, many = (temporaries(n).temp_size_in_bytes for n in (4096, 16384))
    assert many < 6 * few
