"""Causal attention: against float64, without leaks from the future, and token-by-token decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import nnx

from skyformer_jax import attention
from skyformer_jax.attention.decoding import DECODABLE, decode, init_decoding
from skyformer_jax.attention.prefix_sums import CHUNK
from skyformer_jax.layers import MultiHeadAttention
from skyformer_jax.nnx_layers import MultiHeadAttention as NnxAttention

BATCH, HEADS, HEAD_DIM, LANDMARKS = 2, 2, 8, 6
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(LANDMARKS, HEADS, HEAD_DIM)).astype(np.float32)
KERNEL = RNG.normal(size=(3, HEADS, HEAD_DIM)).astype(np.float32)
FEATURES = RNG.normal(size=(16, HEAD_DIM)).astype(np.float32)
OPTIONS = {
    "softmax": ("softmax", {}),
    "kernelized": ("kernelized", {}),
    "kernelized, normalised": ("kernelized", {"normalize": True}),
    "skyformer": ("skyformer", {"landmarks": POINTS, "inverse": "cholesky"}),
    "skyformer, normalised": ("skyformer", {"landmarks": POINTS, "normalize": True}),
    "skyformer, with a convolution": ("skyformer", {"landmarks": POINTS, "conv_kernel": KERNEL}),
    "performer": ("performer", {"projection": FEATURES}),
}
each = pytest.mark.parametrize("case", OPTIONS)


def slow_lengths(*lengths):
    return [pytest.param(length, marks=pytest.mark.slow) for length in lengths]


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, BATCH, length, HEADS, HEAD_DIM)).astype(np.float32)
    mask = rng.random((BATCH, length)) < 0.8
    return q, k, v, mask


@functools.cache
def jitted(case):
    name, options = OPTIONS[case]
    return jax.jit(functools.partial(attention.ATTENTIONS[name], is_causal=True, **options))


def attend(case, q, k, v, **more):
    return jitted(case)(q, k, v, **more)


def float64(case, q, k, v, mask):
    """Float64 output for the last query, which may attend to every unmasked key."""
    name, options = OPTIONS[case]
    normalize = options.get("normalize", False)
    if name == "softmax":
        return references.softmax(q, k, v, mask)[:, -1]
    if name == "kernelized":
        return references.kernelized(q, k, v, mask, normalize=normalize)[:, -1]
    if name == "performer":
        return references.performer(q, k, v, FEATURES, mask)[:, -1]
    points = [POINTS] * len(q)
    out = references.skyformer_from(q, k, v, points, mask, normalize=normalize)[:, -1]
    if "conv_kernel" in options:
        values = np.where(np.asarray(mask)[..., None, None], v, 0.0)[:, -3:]
        out += (values * KERNEL[-values.shape[1] :]).sum(axis=1)
    return out


def test_what_is_causal_is_listed():
    assert DECODABLE == ("softmax", "kernelized", "skyformer", "performer")


@each
@pytest.mark.parametrize("length", [CHUNK + 1, *slow_lengths(1, 2)])
def test_each_position_is_the_last_of_a_shorter_sequence(case, length):
    q, k, v, mask = inputs(length)
    out = np.asarray(attend(case, q, k, v, mask=mask))
    for i in {0, length // 2, CHUNK - 1, length - 1} & set(range(length)):
        expected = float64(case, *(x[:, : i + 1] for x in (q, k, v, mask)))
        np.testing.assert_allclose(out[:, i], expected, rtol=2e-3, atol=2e-3)


@each
@pytest.mark.parametrize("length", [CHUNK + 2, *slow_lengths(3, CHUNK - 1, CHUNK)])
def test_no_output_depends_on_a_later_position(case, length):
    """Gradients of the outputs up to a position are exactly 0 at later positions."""
    q, k, v, mask = inputs(length)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients_of_outputs(q, k, v, chosen):
        out = attend(case, q, k, v, mask=mask)
        return jnp.where(chosen[:, None, None], jnp.sin(out), 0).sum()

    for last in {0, length // 2, CHUNK - 1, CHUNK, length - 2} & set(range(length - 1)):
        gradients = jax.device_get(gradients_of_outputs(q, k, v, np.arange(length) <= last))
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            assert np.abs(gradient[:, last + 1 :]).max() == 0
        assert np.abs(gradients[2]).max() > 0 or not mask[:, : last + 1].any()


@each
def test_segments_are_sequences_of_their_own(case):
    """Segment borders lie within chunks and at a chunk border; one segment spans several chunks."""
    borders = [0, 5, 40, CHUNK, 2 * CHUNK + 60, 2 * CHUNK + 70]
    q, k, v, mask = inputs(borders[-1])
    ids = np.repeat(np.arange(5) + 3, np.diff(borders))
    segment_ids = np.broadcast_to(ids, (BATCH, borders[-1]))
    out = np.asarray(attend(case, q, k, v, mask=mask, segment_ids=segment_ids))
    for begin, end in itertools.pairwise(borders):
        part = [x[:, begin:end] for x in (q, k, v)]
        alone = attend(case, *part, mask=mask[:, begin:end])
        np.testing.assert_allclose(out[:, begin:end], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"segment_ids must be int \[batch, length\]"):
        attend(case, q, k, v, segment_ids=segment_ids[:, 1:])


@each
def test_decoding_equals_the_parallel_form(case):
    """Decodes a prompt in one call, then single tokens, under jit and scan, with padding."""
    name, options = OPTIONS[case]
    length, prompt = CHUNK + 9, CHUNK + 3
    q, k, v, mask = inputs(length)
    expected = np.asarray(attend(case, q, k, v, mask=mask))
    sizes = {"batch": BATCH, "heads": HEADS, "head_dim": HEAD_DIM, "max_length": length}
    state = init_decoding(name, **sizes, **options)
    step = jax.jit(functools.partial(decode, name, **options))
    out, state = step(state, *(x[:, :prompt] for x in (q, k, v)), mask=mask[:, :prompt])
    np.testing.assert_allclose(out, expected[:, :prompt], rtol=1e-4, atol=1e-4)

    def one(state, arrays):
        *arrays, mask = (x[:, None] for x in arrays)
        out, state = decode(name, state, *arrays, mask=mask, **options)
        return state, out[:, 0]

    rest = tuple(np.moveaxis(x[:, prompt:], 1, 0) for x in (q, k, v, mask))
    state, outs = jax.jit(functools.partial(jax.lax.scan, one))(state, rest)
    np.testing.assert_allclose(np.moveaxis(outs, 0, 1), expected[:, prompt:], atol=1e-4)
    assert state["index"] == length
    if "key" in state:  # the cache is full
        assert np.isnan(step(state, q[:, :1], k[:, :1], v[:, :1])[0]).all()


@pytest.mark.parametrize("case", ["skyformer, with a convolution", "performer"])
def test_the_state_has_a_fixed_size(case):
    """Compares the state's shapes after 1,024 and about a million positions, without computing."""
    name, options = OPTIONS[case]

    def state_after(length):
        shape = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)
        sizes = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}
        state = jax.eval_shape(functools.partial(init_decoding, name, **sizes, **options))
        return jax.eval_shape(
            functools.partial(decode, name, **options), state, shape, shape, shape
        )[1]

    assert state_after(1024) == state_after(1 << 20)


def test_landmarks_of_the_sequence_are_refused():
    q, k, v, _ = inputs(10)
    for options in ({}, {"landmark_indices": np.zeros((BATCH, 3), int), "landmarks": POINTS}):
        with pytest.raises(ValueError, match="would tell of later positions"):
            attention.skyformer_attention(q, k, v, is_causal=True, **options)
    with pytest.raises(ValueError, match="q_length must equal kv_length"):
        attention.performer_attention(q[:, 1:], k, v, is_causal=True)
    with pytest.raises(ValueError, match="linformer is not causal; those that can decode: softmax"):
        init_decoding("linformer", batch=1, heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("softmax", {}, marks=pytest.mark.slow),
        ("kernelized", {}),
        ("skyformer", {"landmarks": "learned", "num_landmarks": 6, "conv_size": 3}),
        pytest.param("performer", {"num_features": 16}, marks=pytest.mark.slow),
    ],
)
def test_modules_decode_as_they_attend(name, options):
    """Checks linen and NNX with rotary positions and one key-value head for two query heads."""
    x = RNG.normal(size=(BATCH, 12, 16)).astype(np.float32)
    fields = {"rotary": True, "num_kv_heads": 1, "is_causal": True, "options": options}
    layer = MultiHeadAttention(name, 2, 8, **fields)
    expected, variables = jax.device_get(jax.jit(layer.init_with_output)(jax.random.key(0), x))
    decoder = layer.clone(decode=True)
    cache = jax.jit(decoder.init)(jax.random.key(0), x)["cache"]
    module = NnxAttention(name, 2, 16, 8, **fields, rngs=nnx.Rngs(0))
    for part, values in {**variables["params"], **variables.get("fixed", {})}.items():
        if isinstance(values, dict):
            getattr(module, part).kernel[...] = values["kernel"]
            getattr(module, part).bias[...] = values["bias"]
        else:
            getattr(module, part)[...] = values
    step = nnx.jit(lambda module, x: module(x))
    np.testing.assert_allclose(step(module, x), expected, atol=1e-5)
    module.init_cache(BATCH, 12)
    decode_step = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
    for begin, end in ((0, 7), (7, 8), (8, 12)):
        out, changed = decode_step({**variables, "cache": cache}, x[:, begin:end])
        cache = changed["cache"]
        np.testing.assert_allclose(out, expected[:, begin:end], atol=1e-5)
        np.testing.assert_allclose(step(module, x[:, begin:end]), out, atol=1e-5)
    with pytest.raises(ValueError, match="linformer is not causal"):
        MultiHeadAttention("linformer", 2, 8, is_causal=True).init(jax.random.key(0), x)


@pytest.mark.parametrize("decodes", [False, True])
def test_modules_take_segments_or_say_why_not(decodes):
    """Modules never ignore segment_ids silently, neither without causality nor when decoding."""
    x = RNG.normal(size=(BATCH, 6, 16)).astype(np.float32)
    segment_ids = np.asarray([[0, 0, 0, 1, 1, 1]] * BATCH)
    if decodes:
        decoder = MultiHeadAttention("softmax", 2, 8, decode=True)
        module = NnxAttention("softmax", 2, 16, 8, is_causal=True, rngs=nnx.Rngs(0))
        module.init_cache(BATCH, 6)
        for call in (
            lambda: decoder.init(jax.random.key(0), x, segment_ids=segment_ids),
            lambda: module(x, segment_ids=segment_ids),
        ):
            with pytest.raises(ValueError, match="leave out segment_ids"):
                call()
        return
    layer = MultiHeadAttention("softmax", 2, 8)
    init = jax.jit(layer.init_with_output)
    out, variables = init(jax.random.key(0), x, segment_ids=segment_ids)
    alone = jax.jit(layer.apply)(variables, x[:, 3:])
    np.testing.assert_allclose(out[:, 3:], alone, atol=1e-5)
    linen = MultiHeadAttention("linformer", 2, 8)
    module = NnxAttention("linformer", 2, 16, 8, max_length=6, rngs=nnx.Rngs(0))
    for call in (
        lambda: linen.init(jax.random.key(0), x, segment_ids=segment_ids),
        lambda: module(x, segment_ids=segment_ids),
    ):
        with pytest.raises(ValueError, match="linformer takes no segment_ids; those that do: soft"):
            call()
