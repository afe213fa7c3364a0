"""The primitive's kernels for accelerators, interpreted: float64, and JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from skyformer_jax.attention.gaussian import gaussian_attention

# The most relative error of output and gradients: of float32 under "highest", and of one pass.
TOLERANCE = {"float32": 3e-6, "tf32": 2e-3, "bfloat16": 5e-3}
# q_length, kv_length, head_dim, standard deviation, offset of all points.
CASES = [
    (200, 130, 32, 1, 0),
    (40, 300, 8, 0.3, 3),
    (129, 70, 20, 1, 10),
    pytest.param(64, 64, 64, 1, 0, marks=pytest.mark.slow),
    pytest.param(96, 48, 128, 1, 3, marks=pytest.mark.slow),
    pytest.param(96, 48, 256, 1, 0, marks=pytest.mark.slow),
    pytest.param(1, 1, 16, 1, 0, marks=pytest.mark.slow),
]


def arrays(q_length, kv_length, head_dim, std=1.0, offset=0.0, *, dtype=jnp.float32, batch=2):
    """Query, key, value and the gradient of the output; the points about a common offset."""
    rng = np.random.default_rng(0)
    points = offset * rng.normal(size=head_dim)
    sizes = [(batch, n, 2, head_dim) for n in (q_length, kv_length, kv_length, q_length)]
    query, key, value, d_out = (rng.normal(size=size) for size in sizes)
    return [jnp.asarray(x, dtype) for x in (query * std + points, key * std + points, value, d_out)]


def reference(query, key, value, d_out, scale):
    """Output and gradients by query, key, value and scale, in float64."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value, d_out))
    distances = ((q[..., :, None, :] - k[..., None, :, :]) ** 2).sum(-1)
    s = np.exp(-scale / 2 * distances)
    w = s * (g @ v.swapaxes(-1, -2))
    d_query = scale * (w @ k - w.sum(-1)[..., None] * q)
    d_key = scale * (w.swapaxes(-1, -2) @ q - w.sum(-2)[..., None] * k)
    results = (s @ v, d_query, d_key, s.swapaxes(-1, -2) @ g)
    return [x.swapaxes(1, 2) for x in results] + [-(w * distances).sum() / 2]


@functools.cache
def kernel(implementation="pallas"):
    """Output and gradients, jitted."""

    @jax.jit
    def value_and_gradients(query, key, value, d_out, scale):
        def call(*arrays):
            *arrays, scale = arrays
            return gaussian_attention(*arrays, scale=scale, implementation=implementation)

        out, pull = jax.vjp(call, query, key, value, scale)
        return out, *pull(d_out.astype(out.dtype))

    return value_and_gradients


def relative_error(found, expected):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("q_length", "kv_length", "head_dim", "std", "offset"), CASES)
def test_values_and_gradients(q_length, kv_length, head_dim, std, offset, precision):
    """Rounded as accelerators round, which the kernels do; offset points lose nothing."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    qkvg = arrays(q_length, kv_length, head_dim, std, offset, dtype=dtype)
    scale = head_dim**-0.5
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        found = kernel()(*qkvg, jnp.float32(scale))
    expected = reference(*qkvg, scale)
    for mine, exact, x in zip(found[:4], expected, (jnp.float32(0), *qkvg[:3]), strict=False):
        assert mine.dtype == x.dtype
        assert relative_error(mine, exact) < TOLERANCE[precision]
    # The gradient by the scale is a sum of both signs, so it is held against its terms.
    q, k, _, _ = (np.asarray(x, np.float64) for x in qkvg)
    terms = np.linalg.norm(q - k.mean()) * np.linalg.norm(expected[1]) / scale
    assert abs(float(found[4]) - expected[4]) < TOLERANCE[precision] * max(terms, abs(expected[4]))


@pytest.fixture(scope="module")
def problem():
    """Arrays, a scale, and what the dense form makes of them."""
    *qkv, d_out = arrays(50, 70, 8, batch=4)
    inputs = (*qkv, d_out, jnp.float32(0.3))
    return inputs, kernel("dense")(*inputs)


def assert_near(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE["tf32"]


def test_mapped_and_rematerialised(problem):
    """vmap over examples, each with a scale of its own, of a function under jax.checkpoint."""
    (*inputs, scale), expected = problem

    @jax.checkpoint
    def call(*arrays):
        *arrays, scale = arrays
        arrays = (x[None] for x in arrays)
        return gaussian_attention(*arrays, scale=scale, implementation="pallas")[0]

    def one(query, key, value, d_out, scale):
        out, pull = jax.vjp(call, query, key, value, scale)
        return out, *pull(d_out)

    *found, d_scale = jax.vmap(one)(*inputs, jnp.full(4, scale))
    assert_near((*found, d_scale.sum()), expected)


@pytest.mark.parametrize("axis_type", jax.sharding.AxisType.__members__)
def test_on_meshes(problem, axis_type):
    """Batch and heads divided over a mesh: by jit, explicitly, or by shard_map."""
    inputs, expected = problem
    mesh = jax.make_mesh(
        (2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType[axis_type],) * 2
    )
    along = P("data", None, "heads")
    specs = (*(along,) * 4, P())
    function = kernel()
    if axis_type == "Manual":
        mesh = jax.make_mesh(
            (2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )

        def per_device(*inputs):
            *found, d_scale = kernel()(*inputs)
            return *found, jax.lax.psum(d_scale, ("data", "heads"))

        function = jax.shard_map(
            per_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
        )
    with jax.set_mesh(mesh):
        sharded = (
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(inputs, specs, strict=True)
        )
        found = jax.jit(function)(*sharded)
    if axis_type == "Explicit":
        assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, along), 4)
    assert_near(found, expected)


def test_shard_map_that_checks_what_varies():
    """check_vma=True, its default; the kernel is traced with it, and what is compiled is tiles."""
    *qkv, d_out = arrays(130, 140, 8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradients(query, key, value, d_out):
        def call(*qkv):
            return gaussian_attention(*qkv, scale=0.3)

        return jax.vjp(call, query, key, value)[1](d_out)

    split = jax.shard_map(gradients, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert_near(jax.jit(split)(*qkv, d_out), gradients(*qkv, d_out))


def test_the_platform_that_is_compiled_for_chooses():
    """Not the one that this process runs on: lowered for CUDA here, "auto" is a kernel."""
    *qkv, _ = arrays(200, 130, 32)
    call = jax.jit(functools.partial(gaussian_attention, scale=0.2))
    assert "triton" not in call.trace(*qkv).lower(lowering_platforms=("cpu",)).as_text()
    jaxpr = str(call.trace(*qkv).jaxpr)
    assert "pallas_call" in jaxpr and "cuda" in jaxpr
