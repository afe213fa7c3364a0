"""Flax Linen modules for the attention functions."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from skyformer_jax.attention import REGISTRY, SPLITTABLE, layer_variables, shards, split_options
from skyformer_jax.attention.common import on_automatic_axes, spec_of
from skyformer_jax.attention.decoding import check_decodable, decode, init_decoding
from skyformer_jax.attention.inputs import check_mask
from skyformer_jax.attention.rotary import positions_in_segments, rotate


def dense_inits(fan_in: int) -> dict[str, Any]:
    """Returns initializers for dense layers: uniform in [-1/sqrt(fan_in), 1/sqrt(fan_in)].

    Kernels and biases are initialized as in PyTorch's Linear, and so as in the published code of
    the paper. This matters for the Gaussian kernel: queries and keys have a third of the variance
    that Flax's default initializers give them, so the kernel is wider, its matrix has lower rank,
    and fewer landmarks suffice.

    Args:
      fan_in: number of input features.

    Returns:
      Keyword arguments for nn.Dense, nn.DenseGeneral or nnx.LinearGeneral.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return {"kernel_init": init, "bias_init": init}


def hide_padding(inputs: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Sets the inputs of self-attention to zero at padding, so that NaN there affects no gradient.

    Args:
      inputs: [batch, length, width].
      mask: bool [batch, length], True at real tokens, or None.

    Raises:
      ValueError: if the mask is not boolean or has another shape.
    """
    if mask is None:
        return inputs
    mask = jnp.asarray(mask)
    check_mask(mask, inputs.shape[:2])
    return jnp.where(mask[:, :, None], inputs, 0)


def keeps_statistics(module: nn.Module) -> bool:
    """Returns True if the module is applied with mutable=["statistics"]."""
    return module.is_mutable_collection("statistics") and not module.is_initializing()


def sow_statistic(module: nn.Module, name: str, value: jax.Array) -> None:
    """Stores an array in the collection "statistics"; gradients do not flow through it."""
    value = jax.lax.stop_gradient(value)
    module.sow("statistics", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def with_rotary_positions(
    x: jax.Array,
    axis_name: str | None = None,
    first: jax.Array | int = 0,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Rotates queries or keys [batch, length, heads, head_dim] by their positions.

    Positions count from first, or from 0 within each segment.

    Raises:
      ValueError: for segments of a sequence that is split over devices.
    """
    if segment_ids is None:
        positions = first + shards.positions(x.shape[1], axis_name)
    elif axis_name is not None:
        raise ValueError("rotary positions within segments need the whole sequence on one device")
    else:
        positions = positions_in_segments(segment_ids)
    return on_automatic_axes(rotate, spec_of(x), x, positions)


def masking_options(
    attention: str, *, is_causal: bool, decodes: bool, segment_ids: jax.Array | None
) -> dict[str, Any]:
    """Returns is_causal and segment_ids, where given, as options of an attention function.

    Raises:
      ValueError: if the attention or decoding does not support one of them.
    """
    if is_causal or decodes:
        check_decodable(attention)
    if segment_ids is None:
        return {"is_causal": True} if is_causal else {}
    if decodes:
        raise ValueError("decoding does not support segments: leave out segment_ids")
    able = [name for name, entry in REGISTRY.items() if "segment_ids" in entry.masks]
    if attention not in able:
        raise ValueError(f"{attention} takes no segment_ids; those that do: {', '.join(able)}")
    return {"segment_ids": segment_ids, **({"is_causal": True} if is_causal else {})}


def projected_heads(
    num_heads: int, num_kv_heads: int | None, head_dim: int, value_head_dim: int
) -> dict[str, tuple[int, int]]:
    """Returns the shapes that a layer projects to: {"query": (heads, head_dim), ...}.

    Raises:
      ValueError: if num_heads is not a multiple of num_kv_heads.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}"
        )
    return {
        "query": (num_heads, head_dim),
        "key": (num_kv_heads, head_dim),
        "value": (num_kv_heads, value_head_dim),
    }


class MultiHeadAttention(nn.Module):
    """Multi-head self- or cross-attention with any attention of skyformer_jax.attention.

    Random streams, used if they are in the rngs of apply:

    - "landmarks": draws Skyformer's landmarks, Informer's samples of keys and Reformer's hashes
      again in every call, as in training.
    - "features": redraws Performer's features and BigBird's random blocks, which otherwise stay as
      init drew them.

    Without these streams the layer is deterministic, as in evaluation.

    Collections of variables:

    - "params": the learned parameters, including Linformer's projections and Nystromformer's
      convolution.
    - "fixed": Performer's features, Reformer's rotations, the key of BigBird's blocks. Keep it with
      the parameters. If it is missing in apply, the layer warns and uses the function's own fixed
      draw.
    - "statistics", if it is in `mutable` of apply: for Skyformer `residual`, the [batch, heads] of
      nystrom_residual.

    Attributes:
      attention: one of skyformer_jax.attention.NAMES.
      num_heads: number of query heads.
      head_dim: features of each head.
      options: options of the attention function (such as num_landmarks) and of its variables
        (Nystromformer's conv_size, Linformer's sharing).
      num_kv_heads: number of heads of keys and values, a divisor of num_heads; groups of query
        heads share a head of keys and values. None means num_heads. In Reformer, whose queries are
        its keys, only the values have fewer heads.
      value_head_dim: features of each head of the values; None means head_dim.
      dtype: dtype of the projections and their results; the parameters and the computation of the
        attention itself stay float32.
      rotary: rotates queries and keys by their positions (Su et al., 2021), which count from the
        first position of each segment.
      is_causal: position i attends to positions 0..i only. Supported by softmax, kernelized and
        performer, and by skyformer with landmarks="learned".
      decode: attends causally to the positions of this call and of all earlier calls, whose state
        is in the collection "cache". Pass "cache" to apply with mutable=["cache"], which returns
        the next one. init creates it. For softmax and kernelized it has room for as many positions
        as the inputs of init; for the others there is no limit.
      axis_name: name of the mesh axis, within jax.shard_map, over which the sequence is split:
        inputs and mask are this device's shard. Supported by the attentions of SPLITTABLE, and not
        for init.
    """

    attention: str
    num_heads: int
    head_dim: int
    options: Mapping[str, Any] = FrozenDict()
    dtype: jnp.dtype | None = None
    axis_name: str | None = None
    num_kv_heads: int | None = None
    value_head_dim: int | None = None
    rotary: bool = False
    is_causal: bool = False
    decode: bool = False

    def __post_init__(self) -> None:
        """Freezes the options, since a dict would keep the module from being hashed."""
        object.__setattr__(self, "options", FrozenDict(self.options or {}))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_kv: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Projects, attends, and projects back to the width of inputs_q.

        Args:
          inputs_q: [batch, q_length, width].
          inputs_kv: [batch, kv_length, width]; None means inputs_q (self-attention). Initialize
            Linformer with the largest kv_length that it will be applied to.
          mask: bool [batch, kv_length], True at real tokens. Masked inputs, even NaN, never affect
            the output at real positions or any gradient.
          segment_ids: int [batch, length]. Positions attend only within their segment; the
            positions of a segment are consecutive. Skyformer and performer support segments only
            for causal attention.

        Returns:
          [batch, q_length, width].

        Raises:
          ValueError: for an unknown attention or option, for inputs_kv if the attention shares
            queries and keys, or for axis_name if the attention needs the whole sequence.
        """
        function_options, _ = split_options(self.attention, self.options)
        if self.axis_name is not None:
            if self.attention not in SPLITTABLE:
                raise ValueError(
                    f"{self.attention} needs the whole sequence on one device; those that take a "
                    f"split sequence: {', '.join(SPLITTABLE)}"
                )
            function_options["axis_name"] = self.axis_name
        entry = REGISTRY[self.attention]
        if inputs_kv is None:
            inputs_q = inputs_kv = hide_padding(inputs_q, mask)
        elif entry.shared_query_key:
            raise ValueError(f"{self.attention} shares queries and keys: leave out inputs_kv")

        value_head_dim = self.value_head_dim or self.head_dim
        heads = projected_heads(self.num_heads, self.num_kv_heads, self.head_dim, value_head_dim)

        def project(name: str, inputs: jax.Array) -> jax.Array:
            return nn.DenseGeneral(
                heads[name],
                dtype=self.dtype,
                name=name,
                **dense_inits(inputs.shape[-1]),
            )(inputs)

        kv_length = inputs_kv.shape[1] * shards.num_shards(self.axis_name)
        rng = None
        if entry.stream is not None and self.has_rng(entry.stream):
            rng = self.make_rng(entry.stream)
        query = project("query", inputs_q)
        key = None if entry.shared_query_key else project("key", inputs_kv)
        value = project("value", inputs_kv)
        # The variables replace the options that created them, such as landmarks="learned".
        options = {
            **function_options,
            **self._kept_variables(kv_length, redraw=rng is not None),
        }
        masking = masking_options(
            self.attention,
            is_causal=self.is_causal or self.decode,
            decodes=self.decode,
            segment_ids=segment_ids,
        )
        cache = self._cache(query, value, options) if self.decode else None
        if self.rotary:
            first = 0 if cache is None else cache.value["index"]
            where = (self.axis_name, first, segment_ids)
            query = with_rotary_positions(query, *where)
            key = None if key is None else with_rotary_positions(key, *where)
        if cache is not None and not self.is_initializing():
            assert key is not None  # no causal attention shares queries and keys
            out, cache.value = decode(
                self.attention, cache.value, query, key, value, mask=mask, **options
            )
        else:
            options = {"mask": mask, "rng": rng, **options, **masking}
            out = entry.function(query, key, value, **options)
        if entry.residual and keeps_statistics(self):
            sow_statistic(self, "residual", entry.residual(query, key, **options))
        return nn.DenseGeneral(
            inputs_q.shape[-1],
            axis=(-2, -1),
            dtype=self.dtype,
            name="out",
            **dense_inits(self.num_heads * value_head_dim),
        )(out)

    def _cache(self, query: jax.Array, value: jax.Array, options: Mapping[str, Any]) -> nn.Variable:
        """Returns the variable that holds the decoding state."""
        batch, length, heads, head_dim = query.shape
        start = functools.partial(
            init_decoding,
            self.attention,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            kv_heads=value.shape[2],
            value_dim=value.shape[-1],
            max_length=length,
            dtype=value.dtype,
            **options,
        )
        return self.variable("cache", "state", start)

    def _kept_variables(self, kv_length: int, *, redraw: bool) -> dict[str, jax.Array]:
        """Returns the variables of the attention function, without those that are redrawn."""
        kept: dict[str, jax.Array] = {}
        specs = layer_variables(
            self.attention,
            self.options,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            value_dim=self.value_head_dim,
            kv_length=kv_length,
        )
        for name, spec in specs.items():
            collection = "params" if spec.trained else "fixed"
            value: Any
            if self.has_variable(collection, name):
                # In its stored shape, since Linformer's may be for longer sequences than this one.
                # Unboxed, as in nn.Dense, in case of nn.with_partitioning and the like.
                value = nn.unbox(self.get_variable(collection, name))
            elif spec.trained:
                value = self.param(name, spec.init, spec.shape)
            elif self.is_initializing():
                key = self.make_rng("params")
                value = self.variable("fixed", name, spec.init, key, spec.shape).value
            else:
                if not redraw:
                    warnings.warn(
                        f"{self.attention} was applied without the collection 'fixed', which init "
                        f"returned beside 'params': a default draw replaces its {name}",
                        stacklevel=2,
                    )
                continue
            if spec.trained or not redraw:
                kept[name] = value
        return kept
