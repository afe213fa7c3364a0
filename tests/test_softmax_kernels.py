"""Softmax attention's GPU kernels in interpret mode: float64 and JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from skyformer_jax.attention import softmax_attention, softmax_gpu

KERNELS = {"gpu": (softmax_gpu.gpu_value, softmax_gpu.gpu_gradients)}
# Largest relative error of output and gradients: for float32 arrays at precision "highest" and in
# one pass, and for bfloat16 arrays. "highest" computes scores in the hundreds to float32 accuracy.
TOLERANCE = {
    ("gpu", "float32"): 3e-5,
    ("gpu", "one pass"): 4e-3,
    ("gpu", "bfloat16"): 4e-3,
}
# q_length, kv_length, head_dim, standard deviation, offset of all points, is_causal. The second
# example of each batch has no real key. The keys of the first case are read in two parts.
CASES = [
    (40, 1100, 8, 0.3, 3, False),
    (129, 70, 20, 1, 10, True),
    pytest.param(130, 1100, 16, 1, 0, True, marks=pytest.mark.slow),
    pytest.param(96, 48, 64, 1, 0, False, marks=pytest.mark.slow),
    pytest.param(96, 48, 128, 1, 0, True, marks=pytest.mark.slow),
    pytest.param(96, 48, 256, 1, 0, False, marks=pytest.mark.slow),
    pytest.param(1, 3, 16, 1, 0, False, marks=pytest.mark.slow),
]


def arrays(q_length, kv_length, head_dim, std=1.0, offset=0.0, *, dtype=jnp.float32, kv_heads=2):
    """Query, key and value, which are offset, the output gradient, and a mask."""
    rng = np.random.default_rng(0)
    points = offset * rng.normal(size=head_dim)
    query, key, value, d_out = (
        rng.normal(size=(2, length, heads, head_dim))
        for length, heads in (
            (q_length, 2),
            (kv_length, kv_heads),
            (kv_length, kv_heads),
            (q_length, 2),
        )
    )
    mask = rng.random((2, kv_length)) < 0.7
    mask[0, 0], mask[1] = True, False
    real = mask[:, :, None, None]
    key, value = np.where(real, key * std + points, 0), np.where(real, value + offset, 0)
    floating = (jnp.asarray(x, dtype) for x in (query * std + points, key, value, d_out))
    return *floating, jnp.asarray(mask)


def reference(query, key, value, d_out, mask, scale, is_causal):
    """Output, log-sum-exp and gradients of query, key and value, in float64."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value, d_out))
    allowed = np.broadcast_to(np.asarray(mask)[:, None, None, :], (*q.shape[:3], k.shape[2]))
    if is_causal:
        allowed = allowed & np.tri(*allowed.shape[2:], dtype=bool)
    scores = np.where(allowed, scale * q @ k.swapaxes(-1, -2), -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    sums = np.exp(scores - top).sum(-1, keepdims=True)
    some = sums > 0
    p = np.exp(scores - top) / np.where(some, sums, 1)
    out = p @ v
    w = p * (g @ v.swapaxes(-1, -2) - (g * out).sum(-1, keepdims=True))
    lse = np.where(some, top + np.log(np.where(some, sums, 1)), np.inf)[..., 0]
    results = (out, scale * w @ k, scale * w.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g)
    out, *gradients = (x.swapaxes(1, 2) for x in results)
    return [out, lse, *gradients]


@functools.cache
def interpreted(platform):
    """Returns a jitted function that calls only a platform's kernels, in interpret mode.

    It returns the output, the log-sum-exp, and the gradients of query, key and value.
    """
    value, gradients = KERNELS[platform]

    @functools.partial(jax.jit, static_argnames="is_causal")
    def both(query, key, values, d_out, mask, scale, is_causal):
        how = {"is_causal": is_causal, "interpret": True}
        inputs = (query, key, values, scale, mask)
        out, lse = value(*inputs, **how)
        return out, lse, *gradients(*inputs, out, lse, d_out, **how)

    return both


def relative_error(found, expected):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize(("platform", "precision"), TOLERANCE)
@pytest.mark.parametrize(("q_length", "kv_length", "head_dim", "std", "offset", "is_causal"), CASES)
def test_values_and_gradients(
    q_length, kv_length, head_dim, std, offset, is_causal, platform, precision
):
    """The kernels round as the accelerator does, and offset points lose little accuracy."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    inputs = arrays(q_length, kv_length, head_dim, std, offset, dtype=dtype)
    scale = head_dim**-0.5
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        out, lse, *found = interpreted(platform)(*inputs, jnp.float32(scale), is_causal=is_causal)
    expected, expected_lse, *gradients = reference(*inputs, scale, is_causal)
    for mine, exact in zip((out, *found), (expected, *gradients), strict=True):
        assert relative_error(mine, exact) < TOLERANCE[platform, precision]
    some = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isfinite(lse), some)
    np.testing.assert_allclose(np.asarray(lse)[some], expected_lse[some], rtol=1e-3, atol=5e-3)


def gradients_of(implementation, query, key, value, d_out, mask):
    def call(*qkv):
        return softmax_attention(*qkv, mask=mask, implementation=implementation)

    out, pull = jax.vjp(call, query, key, value)
    return out, *pull(d_out)


@pytest.mark.parametrize("mapped", [False, True], ids=["explicit mesh", "vmap"])
def test_through_the_attention_function(mapped):
    """Checks an explicit mesh, and rematerialization in vmap with heads that share a key."""
    inputs = arrays(70, 90, 8, kv_heads=1 if mapped else 2)
    expected = gradients_of("dense", *inputs)
    function = functools.partial(gradients_of, "pallas")
    if mapped:
        one = jax.checkpoint(lambda *x: function(*(y[None] for y in x)))
        found = [x[:, 0] for x in jax.jit(jax.vmap(one))(*inputs)]
    else:
        mesh = jax.make_mesh((2, 2), ("data", "heads"))
        with jax.set_mesh(mesh):
            specs = [P("data", None, "heads")] * 4 + [P("data")]
            inputs = [
                jax.device_put(x, NamedSharding(mesh, spec))
                for x, spec in zip(inputs, specs, strict=True)
            ]
            found = jax.jit(function)(*inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 2e-3


def test_the_platform_that_is_compiled_for_chooses():
    """The program contains a kernel unless an argument is one that kernels do not take."""
    query, key, value, *_ = arrays(150, 140, 8)

    def kernels(**options):
        call = functools.partial(softmax_attention, **options)
        return "pallas_call" in str(jax.make_jaxpr(call)(query, key, value))

    assert kernels() and kernels(is_causal=True)
    assert not kernels(implementation="chunked")
    assert not kernels(full_mask=jnp.ones((150, 140), bool)) and not kernels(bias=jnp.zeros(()))


def test_what_a_form_does_not_take_is_refused():
    query, key, value, *_ = arrays(4, 5, 8)
    for implementation, options, message in (
        ("flash", {}, "auto, dense, chunked, pallas"),
        ("pallas", {"bias": jnp.zeros(())}, "takes no full_mask, no bias"),
        ("pallas", {"full_mask": jnp.ones((4, 5), bool)}, "takes no full_mask, no bias"),
        ("chunked", {"bias": jnp.zeros(())}, "takes no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            softmax_attention(query, key, value, implementation=implementation, **options)
