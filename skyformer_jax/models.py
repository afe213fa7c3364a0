"""The classifier of the paper: embeddings, pre-norm encoder blocks, pooling, a small head."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from skyformer_jax.errors import UserError
from skyformer_jax.layers import MultiHeadAttention

POOLINGS = ("mean", "cls", "padded_mean")
_EPSILON = 1e-5  # of the layer norms, as in the published code


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both branches."""

    attention: str
    attention_options: Mapping[str, Any]
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool) -> jax.Array:
        """X [batch, length, width], mask bool [batch, length] -> [batch, length, width]."""

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=deterministic)(y)

        y = nn.LayerNorm(epsilon=_EPSILON, name="attention_norm")(x)
        y = MultiHeadAttention(
            self.attention,
            self.num_heads,
            self.head_dim,
            self.attention_options,
            name="attention_layer",
        )(y, mask=mask)
        x = x + drop(y)
        y = nn.LayerNorm(epsilon=_EPSILON, name="mlp_norm")(x)
        y = drop(nn.gelu(nn.Dense(self.mlp_dim, name="mlp_in")(y), approximate=False))
        return x + drop(nn.Dense(x.shape[-1], name="mlp_out")(y))


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
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        for i in range(self.num_layers):
            x = EncoderBlock(
                self.attention,
                self.attention_options,
                self.num_heads,
                self.head_dim,
                self.mlp_dim,
                self.dropout,
                name=f"block_{i}",
            )(x, mask, deterministic=deterministic)
        return pool(nn.LayerNorm(epsilon=_EPSILON, name="final_norm")(x), mask, self.pooling)

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
