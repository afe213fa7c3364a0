"""Flax linen modules around the attention functions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skyformer_jax.attention import ATTENTIONS


class MultiHeadAttention(nn.Module):
    """Multi-head self- or cross-attention on any attention of skyformer_jax.attention.

    Landmarks are drawn by the "landmarks" random stream where there is one (in training); without
    it the attention is deterministic, which is what evaluation uses.

    Attributes:
      attention: a name of skyformer_jax.attention.NAMES.
      num_heads: number of heads.
      head_dim: features of each head.
      options: keyword arguments of the attention function, num_landmarks for example.
    """

    attention: str
    num_heads: int
    head_dim: int
    options: Mapping[str, Any]

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_kv: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Projects, attends, and projects back to the width of inputs_q.

        Args:
          inputs_q: [batch, q_length, width].
          inputs_kv: [batch, kv_length, width]; None means inputs_q (self-attention).
          mask: bool [batch, kv_length], True at real tokens. What stands elsewhere, NaN included,
            changes no real position and no gradient.

        Returns:
          [batch, q_length, width].
        """
        if inputs_kv is None:
            # The padding's own queries are inputs too; their gradients must not carry its junk.
            inputs_q = inputs_q if mask is None else jnp.where(mask[:, :, None], inputs_q, 0)
            inputs_kv = inputs_q

        def project(name: str, inputs: jax.Array) -> jax.Array:
            return nn.DenseGeneral((self.num_heads, self.head_dim), name=name)(inputs)

        out = ATTENTIONS[self.attention](
            project("query", inputs_q),
            project("key", inputs_kv),
            project("value", inputs_kv),
            mask=mask,
            rng=self.make_rng("landmarks") if self.has_rng("landmarks") else None,
            **self.options,
        )
        return nn.DenseGeneral(inputs_q.shape[-1], axis=(-2, -1), name="out")(out)
