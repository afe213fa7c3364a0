"""The classifier of the paper: embeddings, pre-norm encoder blocks, pooling, a small head."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

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


class Classifier(nn.Module):
    """Tokens to logits. The attributes are the fields of config.model and config.attention."""

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
        x = nn.LayerNorm(epsilon=_EPSILON, name="final_norm")(x)
        x = nn.relu(nn.Dense(self.mlp_dim, name="head_hidden")(pool(x, mask, self.pooling)))
        return nn.Dense(self.num_classes, name="head_out")(x)


def build_model(config: ml_collections.ConfigDict) -> Classifier:
    """The model that config.model and config.attention describe.

    model.apply({"params": params}, tokens, mask, deterministic=True, rngs=...) gives logits
    [batch, num_classes].
    """
    options = config.attention.to_dict()
    return Classifier(
        attention=options.pop("name"),
        attention_options=flax.core.FrozenDict(options),  # hashable, so the model is
        **config.model.to_dict(),
    )
