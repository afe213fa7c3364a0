"""Exercises the whole core with the benchmark's packages made unavailable; run by test_core.py.

Prints JSON with the files of all imported skyformer_jax modules and the exported names.
"""

# ruff: noqa: E402  (imports must come after the finder is installed)

import json
import sys

# absl, optax and orbax are not listed because Flax imports them. test_core.py checks in the
# source that our own modules do not.
MISSING = (
    *("importlib_resources", "matplotlib", "ml_collections", "PIL", "tensorboardX"),
    *("tensorflow_datasets", "tqdm"),
)


class _Missing:
    """A meta path finder that makes the packages in MISSING look uninstalled."""

    def find_spec(self, name, path=None, target=None):
        del path, target
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _raises(error, match, call):
    try:
        call()
    except error as raised:
        assert match in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__} that says {match!r}")


sys.meta_path.insert(0, _Missing())

import skyformer_jax

assert "jax" not in sys.modules, "import skyformer_jax imports jax"
assert skyformer_jax.__version__
assert "jax" not in sys.modules, "the version imports jax"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skyformer_jax import attention, convert, errors, layers, models, nnx_layers

LENGTH, HEADS, HEAD_DIM = 64, 2, 4
WIDTH = HEADS * HEAD_DIM
FEW = {
    "skyformer": {"num_landmarks": 8},
    "nystromformer": {"num_landmarks": 8},
    "linformer": {"num_features": 8},
    "performer": {"num_features": 8},
    "informer": {"num_active_queries": 8, "num_sampled_keys": 8},
    "reformer": {"chunk_length": 16},
    "bigbird": {"block_size": 8},
}
query = jax.random.normal(jax.random.key(0), (2, LENGTH, HEADS, HEAD_DIM))
rows = query.reshape(2, LENGTH, WIDTH)
mask = jnp.arange(LENGTH) < jnp.array([LENGTH, 40])[:, None]
tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) % 7

assert len(attention.NAMES) == 9
for name in attention.NAMES:
    options = FEW.get(name, {})
    function = getattr(skyformer_jax, f"{name}_attention")
    assert function is attention.ATTENTIONS[name]
    out = function(query, None if name == "reformer" else query, query, mask=mask, **options)
    assert out.shape == query.shape and jnp.isfinite(out).all(), name

    layer = layers.MultiHeadAttention(name, HEADS, HEAD_DIM, options)
    out, variables = layer.init_with_output(jax.random.key(1), rows, mask=mask)
    assert out.shape == rows.shape and jnp.isfinite(out).all(), name
    assert "params" in variables

for name in ("skyformer", "linformer"):
    layer = nnx_layers.MultiHeadAttention(
        name, HEADS, WIDTH, HEAD_DIM, options=FEW[name], max_length=LENGTH, rngs=nnx.Rngs(0)
    )
    out = layer(rows, mask=mask)
    assert out.shape == rows.shape and jnp.isfinite(out).all(), name

attention_fn = skyformer_jax.attention_fn("skyformer", **FEW["skyformer"])
layer = nn.MultiHeadAttention(num_heads=HEADS, attention_fn=attention_fn)
out, _ = layer.init_with_output(jax.random.key(0), rows, mask=mask[:, None, None])
assert out.shape == rows.shape
layer = nnx.MultiHeadAttention(
    HEADS, WIDTH, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0)
)
assert layer(rows, mask=mask[:, None, None]).shape == rows.shape

config = {
    "attention": {"name": "skyformer", **FEW["skyformer"]},
    "model": {
        "vocab_size": 7,
        "max_length": LENGTH,
        "num_classes": 3,
        "num_documents": 1,
        "num_layers": 1,
        "width": WIDTH,
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "mlp_dim": 16,
        "dropout": 0.1,
        "pooling": "mean",
        "positions": "learned",
        "dtype": "float32",
        "remat": False,
    },
}
model = models.build_model(config)
variables = model.init(jax.random.key(0), tokens, mask, deterministic=True)
logits = jax.jit(lambda tokens: model.apply(variables, tokens, mask, deterministic=True))(tokens)
assert logits.shape == (2, 3) and jnp.isfinite(logits).all()

_raises(errors.UserError, "missing: model.embeddings", lambda: convert.from_pytorch({}))
entry = {"model.embeddings.word_embeddings.weight": np.ones((3, 4), np.float32)}
_raises(errors.UserError, "missing: ", lambda: convert.from_pytorch(entry))
_raises(ValueError, "choose one of: softmax", lambda: attention.default_options("softmaxx"))
_raises(ValueError, "has no option", lambda: skyformer_jax.attention_fn("skyformer", landmark=1))
_raises(AttributeError, "has no attribute 'skyformer'", lambda: skyformer_jax.skyformer)

ours = {
    name: module.__file__
    for name, module in sys.modules.items()
    if name.partition(".")[0] == "skyformer_jax"
}
print(json.dumps({"modules": ours, "exported": skyformer_jax.__all__}))
