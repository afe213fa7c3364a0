"""The TPU kernels: softmax attention's in interpret mode, and all of them compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from skyformer_jax.attention import gaussian_tpu, softmax_tpu, tpu_tiles

# Largest relative error of output and gradients: for float32 arrays at precision "highest" and in
# one bfloat16 pass, and for bfloat16 arrays.
TOLERANCE = {"float32": 2e-5, "one pass": 6e-3, "bfloat16": 3e-3}
# q_length, kv_length, head_dim, standard deviation, offset of all points, masked, is_causal.
CASES = [
    (200, 130, 32, 1, 0, False, False),
    (40, 300, 8, 0.3, 3, True, False),
    (129, 70, 20, 1, 10, True, False),
    (300, 280, 16, 1, 0, True, True),
    pytest.param(96, 48, 128, 1, 3, False, False, marks=pytest.mark.slow),
    pytest.param(1100, 1500, 16, 1, 0, True, False, marks=pytest.mark.slow),
    pytest.param(1, 1, 16, 1, 0, True, False, marks=pytest.mark.slow),
]


def problem(q_length, kv_length, head_dim, std, offset, masked, dtype):
    """Query, key and value, mask, and output gradient; with a mask, the last example has no key."""
    rng = np.random.default_rng(0)
    points = offset * rng.normal(size=head_dim)
    lengths = (q_length, kv_length, kv_length, q_length)
    query, key, value, d_out = (rng.normal(size=(2, n, 2, head_dim)) for n in lengths)
    qkv = (query * std + points, key * std + points, value + offset)
    mask = None
    if masked:
        mask = rng.random((2, kv_length)) < 0.7
        mask[1] = False
        mask = jnp.asarray(mask)
    return [jnp.asarray(x, dtype) for x in qkv], mask, jnp.asarray(d_out, jnp.float32)


def reference(qkv, mask, d_out, scale, is_causal):
    """Output and gradients, and the log-sum-exp, in float64."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (*qkv, d_out))
    scores = scale * q @ k.swapaxes(-1, -2)
    allowed = np.ones(scores.shape, bool) if mask is None else np.asarray(mask)[:, None, None]
    if is_causal:
        allowed = allowed & np.tri(*scores.shape[-2:], dtype=bool)
    scores = np.where(allowed, scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), np.finfo(np.float64).min)
    p = np.exp(scores - top)
    mass = p.sum(-1, keepdims=True)
    lse = np.where(mass > 0, top + np.log(np.where(mass > 0, mass, 1)), np.inf)[..., 0]
    p /= np.where(mass > 0, mass, 1)
    out = p @ v
    w = p * (g @ v.swapaxes(-1, -2) - (g * out).sum(-1, keepdims=True))
    results = (out, scale * w @ k, scale * w.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g)
    return [x.swapaxes(1, 2) for x in results], lse


def found_by_kernels(qkv, mask, d_out, scale, is_causal):
    """What reference computes, by the kernels in interpret mode."""
    options = {"is_causal": is_causal, "interpret": True}

    @jax.jit
    def call(query, key, value, mask, d_out):
        arrays = (query, key, value, jnp.float32(scale), mask)
        out, lse = softmax_tpu.tpu_value(*arrays, **options)
        return out, *softmax_tpu.tpu_gradients(*arrays, out, lse, d_out, **options), lse

    *found, lse = call(*qkv, mask, d_out)
    return found, np.asarray(lse)


def relative_error(found, expected):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("q_length, kv_length, head_dim, std, offset, masked, is_causal", CASES)
def test_softmax(q_length, kv_length, head_dim, std, offset, masked, is_causal, precision):
    """Values and gradients agree with float64, also with offset points; zeros without any key."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    qkv, mask, d_out = problem(q_length, kv_length, head_dim, std, offset, masked, dtype)
    arguments = (qkv, mask, d_out, head_dim**-0.5, is_causal)
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        found, lse = found_by_kernels(*arguments)
    expected, expected_lse = reference(*arguments)
    for mine, exact in zip(found, expected, strict=True):
        assert relative_error(mine, exact) < TOLERANCE[precision]
        assert not masked or not np.asarray(mine[1]).any()
    assert (np.isinf(lse) == np.isinf(expected_lse)).all()
    assert relative_error(*(np.where(np.isinf(x), 0, x) for x in (lse, expected_lse))) < 5e-3


@pytest.mark.parametrize("is_causal", [False, True])
def test_softmax_of_more_than_stays_at_a_time(monkeypatch, is_causal):
    """Keys stay in parts, and causality uses positions in the whole sequence."""
    monkeypatch.setattr(tpu_tiles, "_TILE_OF_LONG_PRODUCTS", 128)
    monkeypatch.setattr(tpu_tiles, "PART", 256)
    qkv, mask, d_out = problem(600, 700, 8, 1, 0, True, jnp.float32)
    with jax.default_matmul_precision("highest"):
        found, _ = found_by_kernels(qkv, mask, d_out, 0.3, is_causal)
    for mine, exact in zip(found, reference(qkv, mask, d_out, 0.3, is_causal)[0], strict=True):
        assert relative_error(mine, exact) < TOLERANCE["float32"]


def value_and_gradients(kernels, query, key, value, d_out):
    """Output and gradients by the kernels of a module, gaussian_tpu or softmax_tpu."""
    if kernels is gaussian_tpu:
        arrays = (query, key, value, jnp.float32(0.2))
        return kernels.tpu_value(*arrays), kernels.tpu_gradients(*arrays, d_out)
    arrays = (query, key, value, jnp.float32(0.2), jnp.isfinite(key[..., 0, 0]))
    out, lse = kernels.tpu_value(*arrays, is_causal=True)
    return out, kernels.tpu_gradients(*arrays, out, lse, d_out, is_causal=True)


@pytest.mark.parametrize("kernels", [gaussian_tpu, softmax_tpu], ids=["gaussian", "softmax"])
@pytest.mark.parametrize(
    "topology, head_dim, dtype, precision",
    [
        ("v5e:2x4", 32, "float32", None),
        ("v5p:2x2x1", 64, "bfloat16", None),
        ("v6e:2x4", 32, "float32", None),
        pytest.param("v5e:2x4", 256, "float32", None, marks=pytest.mark.slow),
        pytest.param("v5e:2x4", 8, "bfloat16", None, marks=pytest.mark.slow),
        pytest.param("v5e:2x4", 64, "float32", "highest", marks=pytest.mark.slow),
        pytest.param("v6e:2x4", 256, "bfloat16", None, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_tpus(kernels, topology, head_dim, dtype, precision):
    """libtpu compiles values and gradients, also for more keys than stay at a time."""
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = NamedSharding(jax.sharding.Mesh(np.array(devices)[:1], ("x",)), P())

    def rows(length, dtype):
        return jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype, sharding=sharding)

    few, many = rows(1000, dtype), rows(9000 if head_dim == 32 else 1500, dtype)
    d_out = rows(few.shape[1], "float32")
    call = functools.partial(value_and_gradients, kernels)
    with jax.default_matmul_precision(precision):
        lowered = jax.jit(call).trace(few, many, many, d_out).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert text.count('"cost_estimate":{') >= 2
