"""A causal language model of the paper's blocks, which decodes with its attention's state."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from skyformer_jax.encoder import EncoderBlock, look_up


class LanguageModel(nn.Module):
    """Predicts the logits of the next token at each position, with rotary positions.

    With decode=True, each call continues the tokens of earlier calls. init creates the collection
    "cache"; pass it to apply with mutable=["cache"], which returns the next one. For skyformer and
    performer its size does not depend on the length. For softmax and kernelized it has room for as
    many tokens as init was given.

    Attributes:
      attention: a causal attention: softmax, kernelized, performer, or skyformer with the option
        landmarks="learned".
      attention_options: the options of the attention.
      vocab_size: number of token ids; 256 for bytes.
      num_layers: number of blocks.
      width: features of a token.
      num_heads: number of heads.
      head_dim: features of each head.
      mlp_dim: hidden features of a block's MLP.
      dropout: dropout rate of both branches of a block.
      dtype: dtype of everything between the embeddings and the final norm.
      decode: whether a call continues the tokens of earlier calls.
    """

    attention: str
    attention_options: Mapping[str, Any]
    vocab_size: int = 256
    num_layers: int = 2
    width: int = 128
    num_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    dropout: float = 0.0
    dtype: str = "float32"
    decode: bool = False

    def __post_init__(self) -> None:
        """Freezes the options, since a dict would keep the module from being hashed."""
        object.__setattr__(self, "attention_options", flax.core.FrozenDict(self.attention_options))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Computes the logits of the next token at each position.

        Args:
          tokens: int [batch, length].
          segment_ids: int [batch, length], the documents of a packed sequence.
          deterministic: False applies dropout, by the "dropout" random stream.

        Returns:
          float32 [batch, length, vocab_size], the logits of the token after each position.
        """
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")
        x = look_up(embed.embedding, tokens.astype(jnp.int32)).astype(self.dtype)
        for i in range(self.num_layers):
            x = EncoderBlock(
                self.attention,
                self.attention_options,
                self.num_heads,
                self.head_dim,
                self.mlp_dim,
                self.dropout,
                self.dtype,
                deterministic,
                None,
                rotary=True,
                is_causal=True,
                decode=self.decode,
                name=f"block_{i}",
            )(x, None, segment_ids)
        x = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="final_norm")(x)
        return nn.Dense(self.vocab_size, name="head")(x)


def generate(
    model: LanguageModel,
    variables: Mapping[str, Any],
    prompt: jax.Array,
    num_tokens: int,
    rng: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Samples tokens after a prompt, which is processed in one call.

    Args:
      model: the language model; generate sets decode=True itself.
      variables: the collections "params" and "fixed" of the model.
      prompt: int [batch, length].
      num_tokens: number of tokens to sample.
      rng: a jax.random key.
      temperature: divisor of the logits; 0 selects the most likely token.

    Returns:
      int32 [batch, num_tokens].
    """
    decoder = model.clone(decode=True)
    room = jnp.zeros((len(prompt), prompt.shape[1] + num_tokens), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), room)["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(cache: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        given = {**variables, "cache": cache}
        logits, changed = decoder.apply(given, tokens, mutable=["cache"])
        return changed["cache"], logits[:, -1]

    def choose(logits: jax.Array, rng: jax.Array) -> jax.Array:
        if temperature == 0:
            return logits.argmax(axis=-1).astype(jnp.int32)
        return jax.random.categorical(rng, logits / temperature).astype(jnp.int32)

    def one(carry: tuple[Any, jax.Array], rng: jax.Array) -> tuple[Any, jax.Array]:
        cache, token = carry
        cache, logits = step(cache, token[:, None])
        return (cache, choose(logits, rng)), token

    first, rest = jax.random.split(rng)
    cache, logits = step(cache, prompt)
    keys = jax.random.split(rest, num_tokens)
    _, tokens = jax.lax.scan(one, (cache, choose(logits, first)), keys)
    return tokens.T
