"""The attentions as the attention_fn that Flax's own multi-head modules take."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention.registry import ATTENTIONS, REGISTRY, split_options


def attention_fn(name: str, **options: Any) -> Callable[..., jax.Array]:
    """An attention as the attention_fn of Flax's own multi-head modules, linen's and NNX's.

        nn.MultiHeadAttention(num_heads=8, attention_fn=attention_fn("skyformer"))
        nnx.MultiHeadAttention(8, 64, attention_fn=attention_fn("skyformer"), rngs=rngs)

    Masks are what Flax builds for padding: [batch, 1, 1, kv_length], or
    nn.make_attention_mask(query_mask, key_mask), or any that factors so. Whether a mask factors is
    seen in its values: outside jit another one raises a ValueError; inside jit, where values are
    not known, the output of the examples concerned is NaN. "softmax" takes any mask.

    Attention dropout leaves out whole values, the same for all queries and heads of an example
    (and scales the others up), since only softmax has weights to leave out. In training with
    dropout the module's dropout key also draws what is drawn anew in each step (landmarks,
    samples of keys, hashes). Otherwise nothing is random, unless an rng is among the options.

    "reformer" shares queries and keys: it takes the module's queries, and its key projection goes
    unused. What has to be learned or kept (Linformer's projections, Nystromformer's convolution,
    each layer's own random features) needs a module: skyformer_jax.layers.MultiHeadAttention for
    linen, skyformer_jax.nnx_layers.MultiHeadAttention for NNX. Without one, Linformer's
    projections are random.

    Args:
      name: of skyformer_jax.attention.NAMES.
      **options: keyword arguments of the attention function, num_landmarks for example, and rng.

    Returns:
      A function (query, key, value, bias=None, mask=None, ...) -> [..., q_length, heads,
      head_dim], with the arguments of flax.linen.dot_product_attention.

    Raises:
      ValueError: for an unknown name or option; the returned function raises one where a bias, a
        causal request, another mask or sown weights cannot be had, and says which attentions can.
    """
    entry_options, array_options = split_options(name, options)
    for option in array_options.keys() - entry_options.keys():
        raise ValueError(
            f"option {option!r} of {name} is for parameters, which a bare attention_fn cannot "
            "hold; use MultiHeadAttention of skyformer_jax.layers or skyformer_jax.nnx_layers"
        )
    entry = REGISTRY[name]
    parameters = inspect.signature(entry.function).parameters

    def refuse_unless_supported(argument: str, what: str) -> None:
        if argument not in parameters:
            able = [
                other
                for other, function in ATTENTIONS.items()
                if argument in inspect.signature(function).parameters
            ]
            raise ValueError(f"attention {name!r} cannot honour {what}; can: {', '.join(able)}")

    # Linen passes on only what this signature names.
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
        del broadcast_dropout  # dropped values are shared by the heads in any case
        if module is not None:
            raise ValueError(f"attention {name!r} forms no weights to sow; leave sow_weights=False")
        extra = dict(entry_options)
        if bias is not None:
            refuse_unless_supported("bias", "a bias")
            extra["bias"] = bias
        if is_causal:
            refuse_unless_supported("is_causal", "a causal request")
            extra["is_causal"] = True
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))

        out_shape, lead = query.shape, query.shape[:-3]
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        factors = None
        if mask is not None:
            kv_length = key.shape[1]
            mask = mask if mask.dtype == jnp.bool_ else mask != 0
            mask = jnp.broadcast_to(mask, (*lead, *mask.shape[-3:]))
            mask = mask.reshape(-1, *mask.shape[-3:])
            if "full_mask" in parameters:
                extra["full_mask"] = mask
                mask = None
            else:
                mask, query_mask, factors = _factor(mask, kv_length)
                known = factors is not None and not isinstance(factors, jax.core.Tracer)
                if known and not np.all(factors):
                    refuse_unless_supported("full_mask", "a mask that is not one of padding")
                if "query_mask" in parameters and query_mask is not None:
                    extra["query_mask"] = query_mask

        if dropout_rate > 0 and not deterministic:
            if dropout_rng is None:
                raise ValueError("attention dropout needs a dropout_rng")
            dropout_rng, draw_rng = jax.random.split(dropout_rng)
            keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, value.shape[:2])
            value = jnp.where(keep[:, :, None, None], value / (1 - dropout_rate), 0)
            if entry.stream == "landmarks" and "rng" not in extra:
                extra["rng"] = draw_rng

        with contextlib.ExitStack() as stack:
            if isinstance(precision, str | jax.lax.Precision):
                text = precision if isinstance(precision, str) else precision.name.lower()
                stack.enter_context(jax.default_matmul_precision(text))
            out = entry.function(
                query, None if entry.shared_query_key else key, value, mask=mask, **extra
            )
        if factors is not None:
            out = jnp.where(factors[:, None, None, None], out, jnp.nan)
        return out.reshape(out_shape)

    return apply


def _factor(
    mask: jax.Array, kv_length: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Splits bool [batch, 1 or heads, 1 or q_length, kv_length] into those of keys and queries.

    Returns:
      The keys' mask [batch, kv_length]; the queries' [batch, q_length] or None where the mask says
      nothing of them; and bool [batch], whether mask = queries x keys, None where it must.
    """
    if mask.shape[-1] != kv_length:
        raise ValueError(f"mask has {mask.shape[-1]} columns for {kv_length} keys")
    key_mask = mask.any(axis=(1, 2))
    if mask.shape[1] == mask.shape[2] == 1:
        return key_mask, None, None
    query_mask = mask.any(axis=(1, 3))
    product = query_mask[:, None, :, None] & key_mask[:, None, None, :]
    factors = (mask == product).all(axis=(1, 2, 3))
    if mask.shape[2] == 1:
        return key_mask, None, factors
    if query_mask.shape == key_mask.shape:
        # Broadcast from [batch, 1, 1, kv_length], it says nothing of the queries: as there, those
        # at padding do not count.
        query_mask = jnp.where(query_mask.all(axis=1, keepdims=True), key_mask, query_mask)
    return key_mask, query_mask, factors
