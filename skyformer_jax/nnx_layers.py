"""Flax NNX modules for the attention functions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from skyformer_jax.attention import REGISTRY, layer_variables, split_options
from skyformer_jax.attention.decoding import check_decodable, decode, init_decoding
from skyformer_jax.layers import (
    dense_inits,
    hide_padding,
    masking_options,
    projected_heads,
    with_rotary_positions,
)


class Fixed(nnx.Variable):
    """Random numbers that a module draws at construction and keeps; not a parameter."""


class MultiHeadAttention(nnx.Module):
    """Multi-head self- or cross-attention with any attention of skyformer_jax.attention.

    The NNX form of skyformer_jax.layers.MultiHeadAttention: it computes the same function and, with
    the same parameters, the same numbers. As there, the streams "landmarks" and "features" of the
    rngs of a call provide the random numbers.

    Args:
      attention: one of skyformer_jax.attention.NAMES.
      num_heads: number of query heads.
      in_features: width of the inputs and of the output.
      head_dim: features of each head.
      options: options of the attention function and of its variables (see
        skyformer_jax.attention.registry).
      max_length: the largest kv_length; only Linformer needs it.
      num_kv_heads: number of heads of keys and values, a divisor of num_heads; groups of query
        heads share a head of keys and values. None means num_heads. In Reformer, whose queries are
        its keys, only the values have fewer heads.
      value_head_dim: features of each head of the values; None means head_dim.
      rotary: rotates queries and keys by their positions (Su et al., 2021), which count from the
        first position of each segment.
      is_causal: position i attends to positions 0..i only. Supported by softmax, kernelized and
        performer, and by skyformer with landmarks="learned".
      dtype: dtype of the projections and their results; None means that of inputs and parameters.
        The computation of the attention itself stays float32.
      param_dtype: dtype of the parameters of the projections.
      rngs: its "params" stream draws the parameters and the fixed random numbers.

    Raises:
      ValueError: for an unknown attention or option, a missing max_length, or a num_heads that is
        not a multiple of num_kv_heads.
    """

    def __init__(
        self,
        attention: str,
        num_heads: int,
        in_features: int,
        head_dim: int,
        *,
        options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        num_kv_heads: int | None = None,
        value_head_dim: int | None = None,
        rotary: bool = False,
        is_causal: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention = attention
        if is_causal:
            check_decodable(attention)
        self.rotary, self.is_causal, self.decode = rotary, is_causal, False
        self._shapes = (num_heads, num_kv_heads, head_dim, value_head_dim or head_dim)
        self.cache: nnx.Cache | None = nnx.data(None)
        # Frozen, so that the graph of the module is hashable.
        self._options: FrozenDict[str, Any] = FrozenDict(split_options(attention, options or {})[0])
        value_head_dim = value_head_dim or head_dim
        heads = projected_heads(num_heads, num_kv_heads, head_dim, value_head_dim)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        inits = {**dense_inits(in_features), **dtypes}
        self.query = nnx.LinearGeneral(in_features, heads["query"], rngs=rngs, **inits)
        if not REGISTRY[attention].shared_query_key:
            self.key = nnx.LinearGeneral(in_features, heads["key"], rngs=rngs, **inits)
        self.value = nnx.LinearGeneral(in_features, heads["value"], rngs=rngs, **inits)
        inits = {**dense_inits(num_heads * value_head_dim), **dtypes}
        self.out = nnx.LinearGeneral(
            (num_heads, value_head_dim), in_features, axis=(-2, -1), rngs=rngs, **inits
        )
        specs = layer_variables(
            attention,
            options or {},
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_head_dim,
            kv_length=max_length,
        )
        self._trained: FrozenDict[str, bool] = FrozenDict(
            {name: spec.trained for name, spec in specs.items()}
        )
        for name, spec in specs.items():
            kind = nnx.Param if spec.trained else Fixed
            setattr(self, name, kind(spec.init(rngs.params(), spec.shape)))

    def init_cache(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> None:
        """Starts decoding: each later call attends to its own and all earlier positions.

        Sets `decode` to True. Set it to False to attend as before.

        Args:
          batch: number of sequences.
          max_length: largest number of positions; softmax and kernelized cache the keys and values
            of that many.
          dtype: dtype of the cached keys and values.
        """
        heads, kv_heads, head_dim, value_dim = self._shapes
        state = init_decoding(
            self.attention,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            kv_heads=kv_heads,
            value_dim=value_dim,
            max_length=max_length,
            dtype=dtype,
            **self._arrays(redrawn=False),
        )
        self.cache, self.decode = nnx.Cache(state), True

    def _arrays(self, *, redrawn: bool) -> dict[str, Any]:
        """Returns the options and the variables, without those that are redrawn."""
        # The variables replace the options that created them, such as landmarks="learned".
        return {
            **self._options,
            **{
                name: getattr(self, name)[...]
                for name, trained in self._trained.items()
                if trained or not redrawn
            },
        }

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_kv: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Projects, attends, and projects back to in_features.

        Args:
          inputs_q: [batch, q_length, in_features].
          inputs_kv: [batch, kv_length, in_features]; None means inputs_q (self-attention).
          mask: bool [batch, kv_length], True at real tokens. Masked inputs, even NaN, never affect
            the output at real positions or any gradient.
          segment_ids: int [batch, length]. Positions attend only within their segment; the
            positions of a segment are consecutive. Skyformer and performer support segments only
            for causal attention.
          rngs: has the stream "landmarks" or "features" for drawing; None is deterministic.

        Returns:
          [batch, q_length, in_features].

        Raises:
          ValueError: for inputs_kv if the attention shares queries and keys.
        """
        entry = REGISTRY[self.attention]
        if inputs_kv is None:
            inputs_q = inputs_kv = hide_padding(inputs_q, mask)
        elif entry.shared_query_key:
            raise ValueError(f"{self.attention} shares queries and keys: leave out inputs_kv")
        rng = None
        if rngs is not None and entry.stream is not None and entry.stream in rngs:
            rng = rngs[entry.stream]()
        query, key, value = self.query(inputs_q), None, self.value(inputs_kv)
        if not entry.shared_query_key:
            key = self.key(inputs_kv)
        cache = self.cache if self.decode else None
        state: Any = None if cache is None else cache.get_value()
        masking = masking_options(
            self.attention,
            is_causal=self.is_causal,
            decodes=cache is not None,
            segment_ids=segment_ids,
        )
        if self.rotary:
            first = 0 if state is None else state["index"]
            where = (None, first, segment_ids)
            query = with_rotary_positions(query, *where)
            key = None if key is None else with_rotary_positions(key, *where)
        options = self._arrays(redrawn=rng is not None)
        if cache is not None:
            assert key is not None  # no causal attention shares queries and keys
            out, state = decode(self.attention, state, query, key, value, mask=mask, **options)
            cache.set_value(state)
            return self.out(out)
        options |= {"mask": mask, "rng": rng, **masking}
        return self.out(entry.function(query, key, value, **options))
