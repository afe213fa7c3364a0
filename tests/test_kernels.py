"""gaussian_attention's GPU and TPU kernels in interpret mode.

They are compared with float64 and used under JAX's transformations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from skyformer_jax.attention import gaussian_tpu, tpu_tiles
from skyformer_jax.attention.gaussian import gaussian_attention
from skyformer_jax.attention.gaussian_gpu import gpu_gradients, gpu_value
from skyformer_jax.attention.gaussian_tpu import tpu_gradients, tpu_value

KERNELS = {"gpu": (gpu_value, gpu_gradients), "tpu": (tpu_value, tpu_gradients)}
# Largest relative error of output and gradients: for float32 arrays at precision "highest"; for
# float32 arrays in one pass, which is TF32 on GPUs and bfloat16 on TPUs; and for bfloat16 arrays.
TOLERANCE = {
    ("gpu", "float32"): 3e-6,
    ("gpu", "one pass"): 1e-3,
    ("gpu", "bfloat16"): 3e-3,
    ("tpu", "float32"): 3e-6,
    ("tpu", "one pass"): 5e-3,
    ("tpu", "bfloat16"): 3e-3,
}
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
    """Query, key, value and output gradient; queries and keys lie around a common offset."""
    rng = np.random.default_rng(0)
    points = offset * rng.normal(size=head_dim)
    sizes = [(batch, n, 2, head_dim) for n in (q_length, kv_length, kv_length, q_length)]
    query, key, value, d_out = (rng.normal(size=size) for size in sizes)
    return [jnp.asarray(x, dtype) for x in (query * std + points, key * std + points, value, d_out)]


def reference(query, key, value, d_out, scale):
    """Output and gradients with respect to query, key, value and scale, in float64."""
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
    """Returns a jitted function that computes the output and the gradients."""

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


@functools.cache
def interpreted(platform):
    """Returns a jitted function that calls only a platform's kernels, in interpret mode."""
    value, gradients = KERNELS[platform]

    @jax.jit
    def value_and_gradients(query, key, values, d_out, scale):
        arrays = (query, key, values, scale)
        return (
            value(*arrays, interpret=True),
            *gradients(*arrays, d_out, interpret=True),
        )

    return value_and_gradients


@pytest.mark.parametrize(("platform", "precision"), TOLERANCE)
@pytest.mark.parametrize(("q_length", "kv_length", "head_dim", "std", "offset"), CASES)
def test_values_and_gradients(q_length, kv_length, head_dim, std, offset, platform, precision):
    """The kernels round as the accelerator does, and offset points lose no accuracy."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    qkvg = arrays(q_length, kv_length, head_dim, std, offset, dtype=dtype)
    scale = head_dim**-0.5
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        found = interpreted(platform)(*qkvg, jnp.float32(scale))
    for mine, exact in zip(found, reference(*qkvg, scale), strict=False):
        assert relative_error(mine, exact) < TOLERANCE[platform, precision]


@pytest.mark.parametrize("platform", KERNELS)
def test_dtypes_may_differ(platform):
    """Queries and keys of different dtypes share one centre, and all arrays are rounded alike."""
    q, k, v, d_out = arrays(40, 50, 16, 1, 10)
    qkvg = (q.astype(jnp.bfloat16), k, v.astype(jnp.bfloat16), d_out)
    found = interpreted(platform)(*qkvg, jnp.float32(0.3))
    for mine, exact in zip(found, reference(*qkvg, 0.3), strict=False):
        assert relative_error(mine, exact) < TOLERANCE[platform, "one pass"]


def test_more_than_stays_at_a_time(monkeypatch):
    """On TPUs a shorter side of more than PART rows is processed in parts."""
    monkeypatch.setattr(tpu_tiles, "_TILE_OF_LONG_PRODUCTS", 128)
    monkeypatch.setattr(tpu_tiles, "PART", 256)
    for lengths in ((700, 600), (600, 700)):
        qkvg = arrays(*lengths, 8, batch=1)
        with jax.default_matmul_precision("highest"):
            found = gaussian_tpu.tpu_gradients(*qkvg[:3], jnp.float32(0.3), qkvg[3], interpret=True)
        for mine, exact in zip(found, reference(*qkvg, 0.3)[1:], strict=False):
            assert relative_error(mine, exact) < TOLERANCE["tpu", "float32"]


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_gradients_are_of_the_precision_of_the_call(wrapped):
    """Gradients use the precision set at the call, although they are traced outside of it."""
    qkvg = arrays(40, 50, 8)

    @wrapped
    def gradients(query, key, value, d_out):
        def call(*qkv):
            with jax.default_matmul_precision("highest"):
                return gaussian_attention(*qkv, scale=0.3, implementation="pallas")

        return jax.vjp(call, query, key, value)[1](d_out)

    for mine, exact in zip(gradients(*qkvg), reference(*qkvg, 0.3)[1:], strict=False):
        assert relative_error(mine, exact) < TOLERANCE["gpu", "float32"]


def test_the_gradient_by_scale():
    """The sum has terms of both signs, so its error is compared with the terms' size."""
    qkvg = arrays(60, 40, 16, 1, 3)
    found = float(kernel()(*qkvg, jnp.float32(0.25))[4])
    expected = reference(*qkvg, 0.25)
    q, k = (np.asarray(x, np.float64) for x in qkvg[:2])
    assert abs(found - expected[4]) < 1e-3 * np.linalg.norm(q - k.mean()) * np.linalg.norm(
        expected[1]
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "mode",
    [
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.enable_x64(True),
    ],
    ids=["ranks", "dtypes", "64 bits"],
)
def test_strict_modes(mode, dtype):
    """Covers what "auto" traces for every platform, at sizes above the dense form's."""
    with mode():
        qkv = arrays(130, 140, 8, dtype=dtype, batch=1)[:3]

        def call(*qkv):
            return gaussian_attention(*qkv, scale=0.3).sum()

        for gradient, x in zip(jax.jit(jax.grad(call, (0, 1, 2)))(*qkv), qkv, strict=True):
            assert gradient.dtype == x.dtype
        assert jax.eval_shape(lambda *x: jax.jvp(call, x, x)[1], *qkv).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiles_for_tpus(dtype):
    """libtpu compiles the output and the gradients, with more queries than keys and vice versa."""
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    sharding = NamedSharding(jax.sharding.Mesh(np.array(devices)[:1], ("x",)), P())

    def value_and_gradients(query, key, value, d_out):
        call = functools.partial(gaussian_attention, scale=0.2, implementation="auto")
        out, pull = jax.vjp(jax.vmap(lambda *x: call(*(y[None] for y in x))[0]), query, key, value)
        return out, pull(d_out)

    def rows(length, dtype):
        return jax.ShapeDtypeStruct((2, length, 2, 32), dtype, sharding=sharding)

    for q_length, kv_length in ((1000, 128), (128, 1000)):
        keys = rows(kv_length, dtype)
        shapes = (rows(q_length, dtype), keys, keys, rows(q_length, jnp.float32))
        text = jax.jit(value_and_gradients).lower(*shapes).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.fixture(scope="module")
def problem():
    """Arrays and a scale, and the dense form's output and gradients for them."""
    *qkv, d_out = arrays(50, 70, 8, batch=4)
    inputs = (*qkv, d_out, jnp.float32(0.3))
    return inputs, kernel("dense")(*inputs)


def assert_near(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE["gpu", "one pass"]


def test_mapped_and_rematerialised(problem):
    """Checks vmap over examples, each with its own scale, of a function under jax.checkpoint."""
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
    """Checks batch and heads sharded over a mesh with automatic, explicit or manual axes."""
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
    """Checks check_vma=True, the default: the kernel is traced, and the tiled form is compiled."""
    *qkv, d_out = arrays(130, 140, 8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradients(query, key, value, d_out):
        def call(*qkv):
            return gaussian_attention(*qkv, scale=0.3)

        return jax.vjp(call, query, key, value)[1](d_out)

    split = jax.shard_map(gradients, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert_near(jax.jit(split)(*qkv, d_out), gradients(*qkv, d_out))


def test_the_platform_that_is_compiled_for_chooses():
    """The platform that a program is lowered for decides, not the one that this process runs on.

    On the CPU, "auto" contains no kernel; the traced program holds one for CUDA.
    """
    *qkv, _ = arrays(200, 130, 32)
    call = jax.jit(functools.partial(gaussian_attention, scale=0.2))
    assert "triton" not in call.trace(*qkv).lower(lowering_platforms=("cpu",)).as_text()
    jaxpr = str(call.trace(*qkv).jaxpr)
    assert "pallas_call" in jaxpr and "cuda" in jaxpr
