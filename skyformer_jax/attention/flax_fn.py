"""The attentions as an attention_fn for Flax's own multi-head modules."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention.common import on_automatic_axes, out_spec, spec_of
from skyformer_jax.attention.inputs import floating_arrays, with_all_axes
from skyformer_jax.attention.registry import REGISTRY, split_options


def attention_fn(name: str, **options: Any) -> Callable[..., jax.Array]:
    """Returns an attention as an attention_fn for Flax's multi-head modules, linen's and NNX's.

        nn.MultiHeadAttention(num_heads=8, attention_fn=attention_fn("skyformer"))
        nnx.MultiHeadAttention(8, 64, attention_fn=attention_fn("skyformer"), rngs=rngs)

    A mask must be broadcastable to [..., heads, q_length, kv_length] and nonzero where a query may
    attend to a key, as in flax.linen.dot_product_attention. Attentions that take a full_mask
    according to the registry, such as "softmax", accept any such mask. The others accept the masks
    that Flax builds for padding: [batch, 1, 1, kv_length], nn.make_attention_mask(query_mask,
    key_mask), and any other mask that is such a product of a query mask and a key mask. This is
    checked by value: outside jit, any other mask raises a ValueError; inside jit, where values are
    unknown, the output of the affected examples is NaN. Keys that no query attends to, even NaN,
    never affect the output.

    Key and value may have fewer heads than query, and value may have another head_dim. With
    sow_weights, "softmax" sows its weights as Flax's function does.

    Attention dropout drops whole values, the same ones for all queries and heads of an example, and
    scales the others up, because only softmax has weights to drop. In training with dropout, the
    module's dropout key also draws what is redrawn in each training step (landmarks, sampled keys,
    hashes). Otherwise nothing is random, unless the options contain an rng.

    "reformer" shares queries and keys: it uses the module's queries and ignores its keys. Arrays
    that must be learned or kept (Linformer's projections, Nystromformer's convolution, each
    layer's own random features) need a module: skyformer_jax.layers.MultiHeadAttention for linen,
    skyformer_jax.nnx_layers.MultiHeadAttention for NNX. Without such a module, Linformer's
    projections are random.

    Args:
      name: one of skyformer_jax.attention.NAMES.
      **options: options of the attention function, such as num_landmarks or rng.

    Returns:
      A function (query, key, value, bias=None, mask=None, ...) -> [..., q_length, heads,
      value_dim], with the arguments of flax.linen.dot_product_attention.

    Raises:
      ValueError: for an unknown name or option. The returned function raises a ValueError for a
        bias or mask of the wrong shape, and for a bias, is_causal, a mask or sow_weights that the
        attention does not support; the message lists the attentions that do.
    """
    function_options, variable_options = split_options(name, options)
    for option in variable_options.keys() - function_options.keys():
        raise ValueError(
            f"option {option!r} of {name} is for parameters, which a bare attention_fn cannot "
            "hold; use MultiHeadAttention from skyformer_jax.layers or skyformer_jax.nnx_layers"
        )

    # Linen passes on only the arguments that this signature names.
    def apply(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        del broadcast_dropout  # the dropped values are always the same for all heads
        arguments = dict(function_options)
        for given, argument, what in (
            (bias is not None, "bias", "a bias"),
            (is_causal, "is_causal", "a causal request"),
        ):
            if given:
                _check_supported(name, argument, what)
        if is_causal:
            arguments["is_causal"] = True
        query, key, value = floating_arrays(query, key, value)
        bias = bias if bias is None else jnp.asarray(bias)
        _check_lead(query, key, value)
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        if dropout_rate <= 0 or deterministic:
            dropout_rng, dropout_rate = None, 0.0
        elif dropout_rng is None:
            raise ValueError("attention dropout needs a dropout_rng")

        with contextlib.ExitStack() as stack:
            if isinstance(precision, str | jax.lax.Precision):
                text = precision if isinstance(precision, str) else precision.name.lower()
                stack.enter_context(jax.default_matmul_precision(text))
            if module is not None:
                _sow_weights(name, module, query, key, bias, mask, arguments)
            attend = functools.partial(_attend, name, dropout_rate)
            arrays = (query, key, value, bias, mask, dropout_rng, arguments)
            return on_automatic_axes(attend, out_spec(query, value), *arrays)

    return apply


def _attend(
    name: str,
    dropout_rate: float,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    dropout_rng: jax.Array | None,
    arguments: dict[str, Any],
) -> jax.Array:
    """Calls the attention with Flax's arguments, whose batch may have any number of axes."""
    entry = REGISTRY[name]
    lead = query.shape[:-3]
    arguments |= _restrictions(name, bias, mask, query, key)
    factors = arguments.pop("factors", None)
    query, key, value = (_flat_batch(x) for x in (query, key, value))
    if dropout_rng is not None:
        value, draw_rng = _drop_values(value, dropout_rng, dropout_rate)
        if entry.stream == "landmarks":
            arguments.setdefault("rng", draw_rng)
    out = entry.function(query, None if entry.shared_query_key else key, value, **arguments)
    if factors is not None:
        out = jnp.where(factors[:, None, None, None], out, jnp.nan)
    return out.reshape(*lead, *out.shape[1:])


def _sow_weights(
    name: str,
    module: Any,
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    arguments: dict[str, Any],
) -> None:
    """Sows the attention weights into a linen or NNX module, as Flax's own function does.

    Raises:
      ValueError: if the attention forms no weights.
    """
    import flax.linen as nn  # imported here because the functions themselves do not need Flax
    from flax import nnx

    weights_of = REGISTRY[name].weights
    if weights_of is None:
        able = [other for other, entry in REGISTRY.items() if entry.weights is not None]
        raise ValueError(
            f"attention {name!r} forms no weights to sow: leave sow_weights=False; "
            f"those that do: {', '.join(able)}"
        )

    def weights(
        query: jax.Array,
        key: jax.Array,
        bias: jax.Array | None,
        mask: jax.Array | None,
        arguments: dict[str, Any],
    ) -> jax.Array:
        lead = query.shape[:-3]
        arguments = {k: v for k, v in arguments.items() if k != "rng"}
        arguments |= _restrictions(name, bias, mask, query, key)
        query, key = (_flat_batch(x) for x in (query, key))
        found = weights_of(query, key, **arguments)
        return found.reshape(*lead, *found.shape[1:])

    *batch, rows, heads, _ = spec_of(query)
    found = on_automatic_axes(
        weights, (*batch, heads, rows, None), query, key, bias, mask, arguments
    )
    collection = "intermediates" if isinstance(module, nn.Module) else nnx.Intermediate
    module.sow(collection, "attention_weights", found)


def _check_supported(name: str, argument: str, what: str) -> None:
    """Raises a ValueError that lists the attentions with this argument, unless this one has it."""
    if argument not in REGISTRY[name].masks:
        able = [other for other, entry in REGISTRY.items() if argument in entry.masks]
        raise ValueError(f"attention {name!r} does not support {what}; use: {', '.join(able)}")


def _drop_values(value: jax.Array, rng: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    """Applies dropout to value, [batch, kv_length, heads, head_dim]; also returns another key."""
    rng, draw_rng = jax.random.split(rng)
    keep = jax.random.bernoulli(rng, jnp.float32(1 - rate), value.shape[:2])
    return jnp.where(keep[:, :, None, None], value / (1 - rate), 0), draw_rng


def _restrictions(
    name: str,
    bias: jax.Array | None,
    mask: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Converts a Flax module's bias and mask to arguments of an attention function.

    Args:
      name: the attention's name.
      bias: broadcastable to [*lead, heads, q_length, kv_length].
      mask: likewise; nonzero where a query may attend to a key.
      query: [*lead, q_length, heads, head_dim].
      key: [*lead, kv_length, kv_heads, head_dim].

    Returns:
      The arguments. If the mask must be a product of a query mask and a key mask and its shape
      does not guarantee this, also "factors", bool [batch]: whether each example's mask is one.
    """
    *lead, q_length, heads, _ = query.shape
    shape = (*lead, heads, q_length, key.shape[-3])
    arguments = {}
    if bias is not None:
        arguments["bias"] = _one_batch_axis(with_all_axes("bias", bias, shape), shape)
    if mask is None:
        return arguments
    mask = with_all_axes("mask", jnp.asarray(mask), shape)
    mask = _one_batch_axis(mask if mask.dtype == jnp.bool_ else mask != 0, shape)
    of_keys, of_queries, factors = _factor(mask, math.prod(lead), shape)
    arguments["mask"] = of_keys
    masks = REGISTRY[name].masks
    if "full_mask" in masks:
        if factors is not None:
            arguments["full_mask"] = mask
        return arguments
    known = factors is not None and not isinstance(factors, jax.core.Tracer)
    if known and not np.all(factors):
        _check_supported(name, "full_mask", "a mask that is not a padding mask")
    if factors is not None:
        arguments["factors"] = factors
    if "query_mask" in masks and of_queries is not None:
        arguments["query_mask"] = of_queries
    return arguments


def _check_lead(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raises a ValueError unless all have at least three axes and the same leading batch axes."""
    shapes = query.shape, key.shape, value.shape
    if min(map(len, shapes)) < 3 or len({shape[:-3] for shape in shapes}) > 1:
        raise ValueError(
            "query, key and value must be [*batch, length, heads, head_dim], and agree in batch; "
            f"got query {query.shape}, key {key.shape} and value {value.shape}"
        )


def _flat_batch(x: jax.Array) -> jax.Array:
    """[*lead, length, heads, head_dim] -> [batch, length, heads, head_dim]."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _one_batch_axis(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[*lead, heads, q_length, kv_length] -> [batch, ...]; batch is 1 if every lead axis is 1."""
    lead, last = x.shape[:-3], x.shape[-3:]
    if any(size != 1 for size in lead):
        lead = shape[:-3]
        x = jnp.broadcast_to(x, (*lead, *last))
    return x.reshape(math.prod(lead), *last)


def _factor(
    mask: jax.Array, batch: int, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Splits a mask into a key mask and a query mask.

    Args:
      mask: bool [batch or 1, heads or 1, q_length or 1, kv_length or 1].
      batch: number of examples.
      shape: the shape of the scores; its last two entries are q_length and kv_length.

    Returns:
      The key mask [batch, kv_length]; the query mask [batch, q_length], or None if the mask does
      not restrict queries; and bool [batch], whether the mask is a product of a query mask and a
      key mask, or None if its shape guarantees this.
    """
    q_length, kv_length = shape[-2:]
    key_mask = jnp.broadcast_to(mask.any(axis=(1, 2)), (batch, kv_length))
    if mask.shape[1] == mask.shape[2] == 1:
        return key_mask, None, None
    query_mask = mask.any(axis=(1, 3))
    product = query_mask[:, None, :, None] & mask.any(axis=(1, 2))[:, None, None, :]
    factors = jnp.broadcast_to((mask == product).all(axis=(1, 2, 3)), (batch,))
    if mask.shape[2] == 1:
        return key_mask, None, factors
    query_mask = jnp.broadcast_to(query_mask, (batch, q_length))
    if q_length == kv_length:
        # A mask that was broadcast from [batch, 1, 1, kv_length] does not restrict queries. Treat
        # it like that mask: queries at padding do not count.
        query_mask = jnp.where(query_mask.all(axis=1, keepdims=True), key_mask, query_mask)
    return key_mask, query_mask, factors
