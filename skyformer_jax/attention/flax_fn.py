"""The attentions as the attention_fn that Flax's own multi-head modules take."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention.registry import REGISTRY, split_options


def attention_fn(name: str, **options: Any) -> Callable[..., jax.Array]:
    """An attention as the attention_fn of Flax's own multi-head modules, linen's and NNX's.

        nn.MultiHeadAttention(num_heads=8, attention_fn=attention_fn("skyformer"))
        nnx.MultiHeadAttention(8, 64, attention_fn=attention_fn("skyformer"), rngs=rngs)

    Masks are those that Flax builds for padding: [batch, 1, 1, kv_length], or
    nn.make_attention_mask(query_mask, key_mask), or any other mask that is such a product. Whether
    a mask is one shows in its values. Outside jit another mask raises a ValueError; inside jit,
    where values are not known, the output of the examples concerned is NaN. "softmax" takes any
    mask.

    Attention dropout drops whole values, the same for all queries and heads of an example, and
    scales the others up, since only softmax has weights to drop. In training with dropout the
    module's dropout key also draws what a training step draws anew (landmarks, samples of keys,
    hashes). Otherwise nothing is random, unless an rng is among the options.

    "reformer" shares queries and keys: it takes the module's queries and ignores its keys. Arrays
    that have to be learned or kept (Linformer's projections, Nystromformer's convolution, each
    layer's own random features) need a module: skyformer_jax.layers.MultiHeadAttention for linen,
    skyformer_jax.nnx_layers.MultiHeadAttention for NNX. Without one, Linformer's projections are
    random.

    Args:
      name: of skyformer_jax.attention.NAMES.
      **options: options of the attention function, num_landmarks for example, and rng.

    Returns:
      A function (query, key, value, bias=None, mask=None, ...) -> [..., q_length, heads,
      head_dim], with the arguments of flax.linen.dot_product_attention.

    Raises:
      ValueError: for an unknown name or option. The returned function raises one for a bias, a
        causal request, a mask or sown weights that the attention cannot honour, and says which
        attentions can.
    """
    function_options, variable_options = split_options(name, options)
    for option in variable_options.keys() - function_options.keys():
        raise ValueError(
            f"option {option!r} of {name} is for parameters, which a bare attention_fn cannot "
            "hold; use MultiHeadAttention of skyformer_jax.layers or skyformer_jax.nnx_layers"
        )
    entry = REGISTRY[name]

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
        del broadcast_dropout  # the heads share the dropped values in any case
        if module is not None:
            raise ValueError(f"attention {name!r} forms no weights to sow; leave sow_weights=False")
        arguments = dict(function_options)
        if bias is not None:
            _check_supported(name, "bias", "a bias")
            arguments["bias"] = bias
        if is_causal:
            _check_supported(name, "is_causal", "a causal request")
            arguments["is_causal"] = True
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))

        out_shape, lead = query.shape, query.shape[:-3]
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        factors = None
        if mask is not None:
            mask_arguments, factors = _mask_arguments(name, mask, lead, key.shape[1])
            arguments |= mask_arguments
        if dropout_rate > 0 and not deterministic:
            value, draw_rng = _drop_values(value, dropout_rng, dropout_rate)
            if entry.stream == "landmarks":
                arguments.setdefault("rng", draw_rng)

        with contextlib.ExitStack() as stack:
            if isinstance(precision, str | jax.lax.Precision):
                text = precision if isinstance(precision, str) else precision.name.lower()
                stack.enter_context(jax.default_matmul_precision(text))
            out = entry.function(query, None if entry.shared_query_key else key, value, **arguments)
        if factors is not None:
            out = jnp.where(factors[:, None, None, None], out, jnp.nan)
        return out.reshape(out_shape)

    return apply


def _check_supported(name: str, argument: str, what: str) -> None:
    """Raises a ValueError, naming who can, unless the attention takes this kind of mask."""
    if argument not in REGISTRY[name].masks:
        able = [other for other, entry in REGISTRY.items() if argument in entry.masks]
        raise ValueError(f"attention {name!r} cannot honour {what}; can: {', '.join(able)}")


def _drop_values(
    value: jax.Array, rng: jax.Array | None, rate: float
) -> tuple[jax.Array, jax.Array]:
    """Value [batch, kv_length, heads, head_dim] after dropout, and a key for further draws."""
    if rng is None:
        raise ValueError("attention dropout needs a dropout_rng")
    rng, draw_rng = jax.random.split(rng)
    keep = jax.random.bernoulli(rng, jnp.float32(1 - rate), value.shape[:2])
    return jnp.where(keep[:, :, None, None], value / (1 - rate), 0), draw_rng


def _mask_arguments(
    name: str, mask: jax.Array, lead: tuple[int, ...], kv_length: int
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """The mask of a Flax module as arguments of an attention function.

    Args:
      name: of the attention.
      mask: broadcastable to [*lead, heads, q_length, kv_length]; not zero where allowed.
      lead: the batch dimensions.
      kv_length: number of keys.

    Returns:
      The arguments; and bool [batch], whether an example's mask is a product of one of queries and
      one of keys, or None where it need not be or is.
    """
    mask = mask if mask.dtype == jnp.bool_ else mask != 0
    mask = jnp.broadcast_to(mask, (*lead, *mask.shape[-3:]))
    mask = mask.reshape(-1, *mask.shape[-3:])
    masks = REGISTRY[name].masks
    if "full_mask" in masks:
        return {"full_mask": mask}, None
    key_mask, query_mask, factors = _factor(mask, kv_length)
    known = factors is not None and not isinstance(factors, jax.core.Tracer)
    if known and not np.all(factors):
        _check_supported(name, "full_mask", "a mask that is not one of padding")
    arguments = {"mask": key_mask}
    if "query_mask" in masks and query_mask is not None:
        arguments["query_mask"] = query_mask
    return arguments, factors


def _factor(
    mask: jax.Array, kv_length: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Splits bool [batch, 1 or heads, 1 or q_length, kv_length] into those of keys and queries.

    Returns:
      The keys' mask [batch, kv_length]; the queries' [batch, q_length], or None where the mask says
      nothing of them; and bool [batch], whether mask = queries x keys, or None where it must be.
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
        # A mask that was broadcast from [batch, 1, 1, kv_length] says nothing of the queries. As
        # there, queries at padding do not count.
        query_mask = jnp.where(query_mask.all(axis=1, keepdims=True), key_mask, query_mask)
    return key_mask, query_mask, factors
