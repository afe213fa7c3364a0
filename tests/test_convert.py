"""Converted parameters of the published code, against its model rewritten in float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from skyformer_jax import models
from skyformer_jax.convert import from_pytorch, variables_from_pytorch
from skyformer_jax.errors import UserError

VOCAB, LENGTH, WIDTH, HEADS, HEAD_DIM, MLP, CLASSES = 16, 24, 12, 3, 5, 20, 10
LAYERS = 2
RANDOM_FEATURES = 7
WORDS = "model.embeddings.word_embeddings.weight"
HEAD = "seq_classifer.mlpblock.0.weight"

erf = np.vectorize(math.erf)


def state_dict_of(num_documents=1, seed=0, attention="softmax"):
    rng = np.random.default_rng(seed)
    state = {}

    def linear(name, outputs, inputs):
        state[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        state[f"{name}.bias"] = 0.2 * rng.normal(size=outputs)

    def norm(name):
        state[f"{name}.weight"] = 1 + 0.2 * rng.normal(size=WIDTH)
        state[f"{name}.bias"] = 0.2 * rng.normal(size=WIDTH)

    state[WORDS] = rng.normal(size=(VOCAB, WIDTH))
    state["model.embeddings.position_embeddings.weight"] = rng.normal(size=(LENGTH, WIDTH))
    for i in range(LAYERS):
        layer = f"model.transformer_{i}"
        norm(f"{layer}.norm1")
        for name in ("W_q", "W_k", "W_v"):
            linear(f"{layer}.mha.{name}", HEADS * HEAD_DIM, WIDTH)
        own = f"{layer}.mha.attn"
        if attention == "linformer":
            state[f"{own}.E"] = rng.normal(size=(HEADS, RANDOM_FEATURES, LENGTH)) / 3
        if attention == "performer":
            matrix = rng.normal(size=(RANDOM_FEATURES, HEAD_DIM))
            state[f"{own}.attn_fn.projection_matrix"] = matrix
        if attention == "reformer":  # the same tensors as W_q and W_v
            state[f"{own}.query_key.weight"] = state[f"{layer}.mha.W_q.weight"]
            state[f"{own}.value.weight"] = state[f"{layer}.mha.W_v.weight"]
        linear(f"{layer}.mha.ff", WIDTH, HEADS * HEAD_DIM)
        norm(f"{layer}.norm2")
        linear(f"{layer}.mlpblock.0", MLP, WIDTH)
        linear(f"{layer}.mlpblock.3", WIDTH, MLP)
    norm("model.norm")
    linear("seq_classifer.mlpblock.0", MLP, WIDTH if num_documents == 1 else 4 * WIDTH)
    linear("seq_classifer.mlpblock.2", CLASSES, MLP)
    return {name: x.astype(np.float32) for name, x in state.items()}


def published_logits(state, attention, tokens, mask):
    """Logits of the published model in float64; tokens and mask are [batch, documents, length]."""
    state = {name: x.astype(np.float64) for name, x in state.items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def softmax(scores):
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def attend(name, head, q, k, v, real):
        if attention == "softmax":
            return softmax(q @ k.T / np.sqrt(HEAD_DIM) - 1e6 * (1 - real)) @ v
        if attention == "kernelized":
            q, k = q * HEAD_DIM**-0.25, k * HEAD_DIM**-0.25
            squares = (q**2).sum(1)[:, None] / 2 + (k**2).sum(1)[None, :] / 2
            return np.exp(q @ k.T - squares) * real @ v
        if attention == "linformer":
            e = state[f"{name}.attn.E"][head]
            k, v = e @ (k * real[:, None]), e @ (v * real[:, None])
            return softmax(q @ k.T / np.sqrt(HEAD_DIM)) @ v
        if attention == "reformer":  # a sequence no longer than one chunk
            norms = np.sqrt((q**2).mean(axis=1, keepdims=True) + 1e-6) * np.sqrt(HEAD_DIM)
            scores = np.where(real > 0, q @ (q / norms).T, -1e9)
            return softmax(np.where(np.eye(len(q)) > 0, -1e5, scores)) @ v
        raise ValueError(attention)

    def performer(name, q, k, v, real):
        """All heads at once, [heads, length, head_dim]: the keys' features share one maximum."""
        matrix = state[f"{name}.attn.attn_fn.projection_matrix"]
        q, k = q * HEAD_DIM**-0.5, k * HEAD_DIM**-0.5 * real[:, None]  # scaled twice, as published

        def features(x, most):
            of_x = x @ matrix.T
            return np.exp(of_x - (x**2).sum(-1, keepdims=True) / 2 - most(of_x)) + 1e-4

        q, k = features(q, lambda x: x.max(-1, keepdims=True)), features(k, np.max)
        out = q @ (k.swapaxes(1, 2) @ (v * real[:, None]))
        return out / (q @ k.sum(1)[..., None])

    def mha(name, x, real):
        def project(projection):
            out = linear(f"{name}.{projection}", x)
            if attention == "reformer":
                out = out - state[f"{name}.{projection}.bias"]
            return out.reshape(len(x), HEADS, HEAD_DIM).swapaxes(0, 1)

        q, k, v = map(project, ("W_q", "W_k", "W_v"))
        if attention == "performer":
            out = performer(name, q, k, v, real)
        else:
            out = [attend(name, head, q[head], k[head], v[head], real) for head in range(HEADS)]
        return linear(f"{name}.ff", np.concatenate(list(out), axis=1))

    def mlp(name, x):
        x = linear(f"{name}.0", x)
        return linear(f"{name}.3", x * (1 + erf(x / np.sqrt(2))) / 2)

    def encode(tokens, real):
        positions = state["model.embeddings.position_embeddings.weight"]
        x = state[WORDS][tokens] + positions[: len(tokens)]
        for i in range(LAYERS):
            layer = f"model.transformer_{i}"
            x = mha(f"{layer}.mha", norm(f"{layer}.norm1", x), real) + x
            x = mlp(f"{layer}.mlpblock", norm(f"{layer}.norm2", x)) + x
        return (norm("model.norm", x) * real[:, None]).mean(axis=0)

    def head(x):
        return linear("seq_classifer.mlpblock.2", np.maximum(linear(HEAD[:-7], x), 0))

    logits = []
    for documents, reals in zip(tokens, mask.astype(np.float64), strict=True):
        pooled = [encode(*document) for document in zip(documents, reals, strict=True)]
        if len(pooled) == 2:
            a, b = pooled
            pooled = [np.concatenate([a, b, a * b, a - b])]
        logits.append(head(pooled[0]))
    return np.stack(logits)


def model_of(num_documents=1, attention="softmax", **options):
    config = common.paper_config("listops_small", attention, max_length=LENGTH)
    config.attention.update(options)
    config.model.update(
        {
            "vocab_size": VOCAB,
            "num_classes": CLASSES,
            "num_layers": LAYERS,
            "width": WIDTH,
            "num_heads": HEADS,
            "head_dim": HEAD_DIM,
            "mlp_dim": MLP,
            "pooling": "padded_mean",
            "num_documents": num_documents,
        }
    )
    return models.build_model(config)


def batch(num_documents):
    """Tokens and mask [batch, documents, length]; padding is random, one document has one token."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, num_documents, LENGTH))
    lengths = np.array([[LENGTH, 7], [11, LENGTH], [1, 15]])[:, :num_documents]
    return tokens, np.arange(LENGTH) < lengths[..., None]


def squeeze(x, num_documents):
    return jnp.asarray(x[:, 0] if num_documents == 1 else x)


documents = pytest.mark.parametrize("num_documents", [1, 2])


OPTIONS = {
    "softmax": {},
    "kernelized": {},
    "linformer": {"sharing": "none", "num_features": RANDOM_FEATURES},
    "performer": {"scale": 1 / HEAD_DIM, "num_features": RANDOM_FEATURES},
    "reformer": {},
}
attentions = pytest.mark.parametrize("attention", OPTIONS)


def logits_and_published(num_documents, attention, tokens, mask):
    state = state_dict_of(num_documents, attention=attention)
    model = model_of(num_documents, attention, **OPTIONS[attention])
    inputs = squeeze(tokens, num_documents), squeeze(mask, num_documents)
    variables = model.init(jax.random.key(0), *inputs)  # for Reformer's rotations
    variables = {**variables, **variables_from_pytorch(state, head_dim=HEAD_DIM)}
    expected = published_logits(state, attention, tokens, mask)
    assert expected.std() > 0.1
    return jax.jit(model.apply)(variables, *inputs), expected


@pytest.mark.parametrize(
    ("attention", "num_documents"), [(name, 1) for name in OPTIONS] + [("kernelized", 2)]
)
def test_logits_are_the_published_models(attention, num_documents):
    tokens, mask = batch(num_documents)
    if attention == "performer":  # the published performer does not mask padding
        mask = np.ones_like(mask)
    logits, expected = logits_and_published(num_documents, attention, tokens, mask)
    close = 5e-3 if attention == "performer" else 2e-6  # published: features + 1e-4
    np.testing.assert_allclose(logits, expected, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("attention", "num_documents"), [(name, 1) for name in OPTIONS] + [("softmax", 2)]
)
def test_tree_is_the_models(attention, num_documents):
    tokens, mask = (squeeze(x, num_documents) for x in batch(num_documents))
    model = model_of(num_documents, attention, **OPTIONS[attention])
    expected = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)
    state = state_dict_of(num_documents, attention=attention)
    variables = variables_from_pytorch(state, head_dim=HEAD_DIM)
    expected = {name: expected[name] for name in ("params", "fixed") if name in expected}
    if attention == "reformer":
        del expected["fixed"]  # the published code has none: it redraws rotations
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    params = from_pytorch(state, head_dim=HEAD_DIM, attention=attention)
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])


def test_dual_model_encodes_both_documents_alike():
    model, (tokens, mask) = model_of(2), map(jnp.asarray, batch(2))
    state = state_dict_of(2)
    # A head that depends only on a + b and a * b cannot tell the order of the documents.
    blocks = np.split(state[HEAD].copy(), 4, axis=1)
    state[HEAD] = np.concatenate([blocks[0], blocks[0], blocks[2], 0 * blocks[3]], axis=1)
    params = {"params": from_pytorch(state, head_dim=HEAD_DIM)}
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(params, tokens[:, ::-1], mask[:, ::-1]), apply(params, tokens, mask), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"\[batch, 2, length\], not \[3, 1, 24\]"):
        model.apply(params, tokens[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match="num_documents must be 1 or 2, not 3"):
        model_of(3)


def test_data_parallel_prefix():
    state = state_dict_of()
    params = from_pytorch(state, head_dim=HEAD_DIM)
    wrapped = {f"module.{name}": x for name, x in state.items()}
    jax.tree.map(np.testing.assert_array_equal, from_pytorch(wrapped, head_dim=HEAD_DIM), params)
    wrapped[WORDS] = wrapped.pop(f"module.{WORDS}")
    with pytest.raises(UserError, match=rf"unexpected: .*module\.{HEAD}"):
        from_pytorch(wrapped, head_dim=HEAD_DIM)


def test_anything_like_an_array_is_taken_and_copied():
    state = state_dict_of()
    params = from_pytorch(state, head_dim=HEAD_DIM)
    for convert in (jnp.asarray, np.float64, np.ndarray.tolist):
        other = from_pytorch({name: convert(x) for name, x in state.items()}, head_dim=HEAD_DIM)
        jax.tree.map(np.testing.assert_array_equal, other, params)
    state[WORDS][:] = 0
    assert params["token_embedding"]["embedding"].all()


def refused(state, **options):
    with pytest.raises(UserError) as error:
        from_pytorch(state, **{"head_dim": HEAD_DIM, **options})
    assert "\n" not in str(error.value)
    return str(error.value)


@documents
def test_every_entry_is_checked_by_name(num_documents):
    state = state_dict_of(num_documents)
    for name, x in state.items():
        rest = {other: state[other] for other in state if other != name}
        assert refused(rest).endswith(f"; missing: {name}")
        message = refused({**state, name: x[None]})
        assert message.startswith(f"{name} has shape {[1, *x.shape]}; expected [")
        assert refused({**state, name: x.astype(int)}).startswith(f"{name} holds int64")
        broken = x.copy()
        broken.flat[-1] = np.nan
        assert refused({**state, name: broken}).startswith(f"{name} holds values that are not fin")
    message = refused({**state, "model.transformer_1.mha.attn.extra": np.ones(2)})
    assert message.endswith("; unexpected: model.transformer_1.mha.attn.extra")


@pytest.mark.parametrize("attention", ["linformer", "performer", "reformer"])
def test_entries_of_one_attention_are_checked_by_name(attention):
    state = state_dict_of(attention=attention)
    own = [name for name in state if ".mha.attn." in name]
    assert len(own) == LAYERS * (2 if attention == "reformer" else 1)
    for name in own:
        rest = {other: state[other] for other in state if other != name}
        message = refused(rest)
        assert f"with {attention}; missing: {name}" in message
        assert ("on a GPU" in message) == (attention == "linformer")
        assert refused({**state, name: state[name][..., 1:]}).startswith(name)
        assert refused({**state, name: np.nan * state[name]}).startswith(f"{name} holds values")
    # Without a saved E, only the attention's name tells that a state dict is a Linformer's.
    plain = state_dict_of()
    assert refused(plain, attention=attention).count("missing") == 1
    assert f"unexpected: {own[0]}" in refused(state, attention="softmax")
    assert "unknown attention 'no'" in refused(state, attention="no")
    if attention == "reformer":
        for dtype in ("float16", "float32"):
            for mask in ("mask", "self_mask"):
                state[f"model.transformer_0.mha.attn.{mask}_value_{dtype}"] = np.float32(-1e4)
        from_pytorch(state, head_dim=HEAD_DIM)
    else:
        assert f" for head_dim={HEADS}" in refused(state, head_dim=HEADS)


@documents
def test_the_odd_size_out_is_named(num_documents):
    state = state_dict_of(num_documents)
    for name, x in state.items():
        for axis in range(x.ndim):
            # Any vocabulary size and length is valid; the classes are in two entries, see below.
            if (name.endswith("embeddings.weight") or name.endswith("mlpblock.2.weight")) and (
                axis == 0
            ):
                continue
            odd = np.delete(x, 0, axis)
            message = refused({**state, name: odd})
            assert message.startswith(f"{name} has shape {list(odd.shape)}; expected [")
    assert refused({**state, HEAD: np.ones((MLP, 2 * WIDTH))}).endswith(
        f"expected [{MLP}, {WIDTH} or {4 * WIDTH}]"
    )
    message = refused({**state, WORDS: np.ones(3)})
    assert message == f"{WORDS} has shape [3]; expected [vocab, {WIDTH}]"
    assert refused(dict.fromkeys(state, 1.0)) == f"{WORDS} has shape []; expected [vocab, width]"
    classes = "seq_classifer.mlpblock.2"
    message = refused({**state, f"{classes}.weight": np.ones((4, MLP))})
    assert message == f"{classes}.bias has shape [{CLASSES}]; expected [4]"


def test_a_gap_in_the_layers_is_missing():
    state = state_dict_of()
    third = {
        name.replace("transformer_1", "transformer_2"): x
        for name, x in state.items()
        if "transformer_1" in name
    }
    rest = {name: x for name, x in state.items() if "transformer_1" not in name}
    message = refused({**rest, **third})
    assert "missing: model.transformer_1.norm1.weight" in message
    assert "transformer_2" not in message
    embeddings = {name: x for name, x in state.items() if "transformer" not in name}
    assert "missing: model.transformer_0.norm1.weight" in refused(embeddings)
    assert len(from_pytorch({**state, **third}, head_dim=HEAD_DIM)) == 8
    assert WORDS in refused({})


@pytest.mark.parametrize("head_dim", [4, 32, 0, -5])
def test_head_dim_must_divide(head_dim):
    message = refused(state_dict_of(), head_dim=head_dim)
    assert f"W_q.weight has {HEADS * HEAD_DIM} rows, which head_dim={head_dim} does" in message


def test_float32_overflow_is_refused():
    state = {name: x.astype(np.float64) for name, x in state_dict_of().items()}
    state[WORDS][0, 0] = 1e200
    assert refused(state).startswith(f"{WORDS} holds values that are not finite")
