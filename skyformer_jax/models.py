"""The classifier of the paper: embeddings, pre-norm encoder blocks, pooling, a small head."""

import functools
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import ml_collections

from skyformer_jax.errors import UserError
from skyformer_jax.layers import MultiHeadAttention

POOLINGS = ("mean", "cls", "padded_mean")
DTYPES = ("float32", "bfloat16")
_STREAMS = ("dropout", "landmarks", "features")  # of random keys, that a block may use
_EPSILON = 1e-5  # of the layer norms, as in the published code


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Sets each element to 0 with probability rate and divides the others by 1 - rate.

    Flax draws 32 bits an element and takes half of what the generator gives for them; with all of
    it, and 16 bits an element, there is a quarter of the work, which otherwise is a tenth of a
    training step. The rate is therefore rounded to a multiple of 2**-16, the division's likewise.

    Args:
      key: a jax.random key.
      x: of any shape.
      rate: in [0, 1).

    Returns:
      As x.
    """
    dropped = round(rate * 2**16)
    num_words = -(-x.size // 4) * 2
    words = jax.extend.random.threefry_2x32(
        jax.random.bits(key, (2,)), jnp.arange(num_words, dtype=jnp.uint32)
    )
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(bits >= dropped, x * (2**16 / (2**16 - dropped)), 0)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both branches."""

    attention: str
    attention_options: Mapping[str, Any]
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float
    dtype: str
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """X [batch, length, width], mask bool [batch, length] -> [batch, length, width]."""
        dtype = jnp.dtype(self.dtype)

        def drop(y: jax.Array) -> jax.Array:
            if self.deterministic or not self.dropout:
                return y
            return dropout(self.make_rng("dropout"), y, self.dropout)

        y = nn.LayerNorm(epsilon=_EPSILON, dtype=dtype, name="attention_norm")(x)
        y = MultiHeadAttention(
            self.attention,
            self.num_heads,
            self.head_dim,
            self.attention_options,
            dtype,
            name="attention_layer",
        )(y, mask=mask)
        x = x + drop(y)
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=dtype, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, dtype=dtype, name="mlp_in")(y), approximate=False)
        return x + drop(nn.Dense(x.shape[-1], dtype=dtype, name="mlp_out")(drop(y)))


def pool(x: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """One vector for each sequence.

    Args:
      x: [batch, length, width].
      mask: bool [batch, length], True at real tokens.
      pooling: "mean" over the real tokens, "cls" (the first token), or "padded_mean", the
        published code's: the sum over the real tokens divided by the padded length.

    Returns:
      [batch, width]; zeros for a mean over no token.
    """
    if pooling == "cls":
        return x[:, 0]
    total = jnp.where(mask[:, :, None], x, 0).sum(axis=1)
    if pooling == "padded_mean":
        return total / x.shape[1]
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


class _Encoder(nn.Module):
    """What the classifiers share. The attributes are fields of config.model and config.attention.

    dtype is that of everything between the embeddings and the final norm; parameters, the
    statistics of norms, the pooling and the head are float32. remat keeps only the blocks' inputs
    for the backward pass, which computes the rest again; its dropout draws other elements.

    The methods make submodules, so they are for the compact __call__ of a subclass, once in each.
    """

    attention: str
    attention_options: Mapping[str, Any]
    vocab_size: int
    max_length: int
    num_classes: int
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float
    pooling: str
    dtype: str = "float32"
    remat: bool = False

    def _encode(self, tokens: jax.Array, mask: jax.Array, *, deterministic: bool) -> jax.Array:
        """Tokens int [batch, length], mask bool [batch, length] -> pooled [batch, width]."""
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"sequences of {length} tokens do not fit model.max_length={self.max_length}"
            )
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")(
            tokens.astype(jnp.int32)
        )
        x = x + self.param("position_embedding", init, (self.max_length, self.width))[:length]
        x = x.astype(self.dtype)
        if self.dropout and not deterministic:
            x = dropout(self.make_rng("dropout"), x, self.dropout)
        block = functools.partial(
            EncoderBlock,
            self.attention,
            self.attention_options,
            self.num_heads,
            self.head_dim,
            self.mlp_dim,
            self.dropout,
            self.dtype,
            deterministic,
        )
        if self.remat and not self.is_initializing():
            x = self._recomputed_blocks(block(parent=None), x, mask)
        else:
            for i in range(self.num_layers):
                x = block(name=f"block_{i}")(x, mask)
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=jnp.float32, name="final_norm")(x)
        return pool(x, mask, self.pooling)

    def _recomputed_blocks(self, block: nn.Module, x: jax.Array, mask: jax.Array) -> jax.Array:
        """All blocks as one loop, of which only the carried x is kept for the backward pass.

        A loop, since compilers may merge the second computation of a block with the first one
        where both stand in a row, as XLA does on CPUs: that would keep everything after all.
        """
        layers = [
            (
                {c: v[f"block_{i}"] for c, v in self.variables.items() if f"block_{i}" in v},
                {s: self.make_rng(s) for s in _STREAMS if self.has_rng(s)},
            )
            for i in range(self.num_layers)
        ]

        @jax.checkpoint
        def step(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, None]:
            variables, rngs = layer
            return block.apply(variables, x, mask, rngs=rngs), None

        return jax.lax.scan(step, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))[0]

    def _head(self, x: jax.Array) -> jax.Array:
        """Features [batch, any] -> logits [batch, num_classes]."""
        x = nn.relu(nn.Dense(self.mlp_dim, name="head_hidden")(x))
        return nn.Dense(self.num_classes, name="head_out")(x)


class Classifier(_Encoder):
    """Tokens to logits."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Classifies.

        Args:
          tokens: int [batch, length], length at most max_length.
          mask: bool [batch, length], True at real tokens.
          deterministic: False applies dropout, by the "dropout" random stream.

        Returns:
          float32 [batch, num_classes], logits.

        Raises:
          ValueError: if the sequence is longer than the table of positions.
        """
        return self._head(self._encode(tokens, mask, deterministic=deterministic))


class DualClassifier(_Encoder):
    """Two documents to logits: one encoder for both, a head on [a, b, a * b, a - b]."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Classifies pairs.

        Args:
          tokens: int [batch, 2, length], length at most max_length.
          mask: bool [batch, 2, length], True at real tokens.
          deterministic: False applies dropout, by the "dropout" random stream.

        Returns:
          float32 [batch, num_classes], logits.

        Raises:
          ValueError: if the tokens are not pairs of documents, or a document is longer than the
            table of positions.
        """
        if tokens.ndim != 3 or tokens.shape[1] != 2:
            raise ValueError(f"tokens must be [batch, 2, length], not {list(tokens.shape)}")
        batch, _, length = tokens.shape
        pooled = self._encode(
            tokens.reshape(2 * batch, length),
            mask.reshape(2 * batch, length),
            deterministic=deterministic,
        ).reshape(batch, 2, self.width)
        a, b = pooled[:, 0], pooled[:, 1]
        return self._head(jnp.concatenate([a, b, a * b, a - b], axis=-1))


def build_model(config: ml_collections.ConfigDict) -> Classifier | DualClassifier:
    """The model that config.model and config.attention describe.

    model.apply({"params": params}, tokens, mask, deterministic=True, rngs=...) gives logits
    [batch, num_classes]. Where config.model has num_documents == 2 it is the DualClassifier, of
    tokens and mask [batch, 2, length].

    Raises:
      UserError: if num_documents is neither 1, its default, nor 2.
    """
    options, fields = config.attention.to_dict(), config.model.to_dict()
    num_documents = fields.pop("num_documents", 1)
    if num_documents not in (1, 2):
        raise UserError(f"model.num_documents must be 1 or 2, not {num_documents!r}")
    return (DualClassifier if num_documents == 2 else Classifier)(
        attention=options.pop("name"),
        attention_options=flax.core.FrozenDict(options),  # hashable, so the model is
        **fields,
    )
