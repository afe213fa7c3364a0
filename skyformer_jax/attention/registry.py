"""The registry of attentions: one entry describes each attention."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skyformer_jax.attention.bigbird import bigbird_attention, bigbird_variables
from skyformer_jax.attention.informer import informer_attention
from skyformer_jax.attention.kernelized import kernelized_attention
from skyformer_jax.attention.linformer import linformer_attention, linformer_variables
from skyformer_jax.attention.nystromformer import nystromformer_attention, nystromformer_variables
from skyformer_jax.attention.performer import performer_attention, performer_variables
from skyformer_jax.attention.reformer import reformer_attention, reformer_variables
from skyformer_jax.attention.residual import nystrom_residual
from skyformer_jax.attention.skyformer import skyformer_attention, skyformer_variables
from skyformer_jax.attention.softmax import softmax_attention, softmax_weights
from skyformer_jax.attention.variables import VariableSpec


def _no_variables(
    *, num_heads: int, head_dim: int, value_dim: int, kv_length: int | None
) -> dict[str, VariableSpec]:
    del num_heads, head_dim, value_dim, kv_length
    return {}


class Attention(NamedTuple):
    """An entry of the registry.

    Attributes:
      function: the attention function, with the common signature.
      options: the keyword arguments specific to this attention and their defaults, which may be
        None. Every attention also takes those in COMMON_OPTIONS.
      weights: computes the attention weights, [batch, heads, q_length, kv_length], from the
        arguments of `function` except value and rng; None if the attention forms no weights.
      earlier_options: values for options that the configs of earlier runs do not contain because
        the options were added later. List every option here that you add to `options`.
      residual: measures how much the attention's approximation misses, float32 [batch, heads],
        from the arguments of `function` except value; None if there is no such diagnostic.
      masks: the arguments that restrict which keys a query attends to, a subset of "mask",
        "query_mask", "full_mask", "bias", "is_causal" and "segment_ids".
      self_attention_only: queries and keys must come from the same sequence.
      splittable: the function takes axis_name, so the sequence may be split over devices.
      stream: the random stream of a module that supplies the function's rng: "landmarks" for
        numbers that training redraws in every step, "features" for numbers that stay fixed unless
        that stream is given, None if nothing is random.
      shared_query_key: the queries also serve as keys; the function takes key=None.
      variables: describes the arrays that a layer keeps for the function, {argument: VariableSpec},
        given num_heads, head_dim, value_dim, kv_length (None if the layer does not know it) and
        variable_options.
      variable_options: the options of `variables` and their defaults.
    """

    function: Callable[..., jax.Array]
    options: Mapping[str, Any] = MappingProxyType({})
    weights: Callable[..., jax.Array] | None = None
    residual: Callable[..., jax.Array] | None = None
    earlier_options: Mapping[str, Any] = MappingProxyType({})
    masks: tuple[str, ...] = ("mask",)
    self_attention_only: bool = False
    splittable: bool = False
    stream: str | None = None
    shared_query_key: bool = False
    variables: Callable[..., dict[str, VariableSpec]] = _no_variables
    variable_options: Mapping[str, Any] = MappingProxyType({})


COMMON_OPTIONS: Mapping[str, Any] = MappingProxyType({"rng": None, "scale": None})

REGISTRY: Mapping[str, Attention] = {
    "softmax": Attention(
        softmax_attention,
        options={"implementation": "auto"},
        weights=softmax_weights,
        earlier_options={"implementation": "auto"},
        masks=("mask", "full_mask", "bias", "is_causal", "segment_ids"),
    ),
    "kernelized": Attention(
        kernelized_attention,
        options={"implementation": "auto", "normalize": False},
        earlier_options={"normalize": False},
        masks=("mask", "full_mask", "is_causal", "segment_ids"),
        splittable=True,
    ),
    "skyformer": Attention(
        skyformer_attention,
        residual=nystrom_residual,
        options={
            "num_landmarks": 128,
            "landmarks": "uniform",
            "landmark_indices": None,
            "gamma": 0.1,
            "inverse": "schulz",
            "num_iterations": 6,
            "normalize": False,
            "conv_kernel": None,
            "implementation": "auto",
        },
        earlier_options={"implementation": "auto", "normalize": False, "conv_size": 0},
        masks=("mask", "query_mask", "is_causal", "segment_ids"),
        splittable=True,
        stream="landmarks",
        variables=skyformer_variables,
        variable_options={"landmarks": "uniform", "num_landmarks": 128, "conv_size": 0},
    ),
    "nystromformer": Attention(
        nystromformer_attention,
        options={"num_landmarks": 128, "num_iterations": 6, "conv_kernel": None},
        masks=("mask", "query_mask"),
        splittable=True,
        variables=nystromformer_variables,
        variable_options={"conv_size": 0},
    ),
    "linformer": Attention(
        linformer_attention,
        options={"num_features": 128, "key_projection": None, "value_projection": None},
        splittable=True,
        stream="features",
        variables=linformer_variables,
        variable_options={"num_features": 128, "sharing": "headwise"},
    ),
    "informer": Attention(
        informer_attention,
        options={"num_active_queries": 128, "num_sampled_keys": 128},
        self_attention_only=True,
        stream="landmarks",
    ),
    "performer": Attention(
        performer_attention,
        options={"num_features": 128, "projection": None},
        masks=("mask", "is_causal", "segment_ids"),
        splittable=True,
        stream="features",
        variables=performer_variables,
        variable_options={"num_features": 128},
    ),
    "reformer": Attention(
        reformer_attention,
        options={
            "scale": 1.0,
            "num_hashes": 2,
            "chunk_length": 64,
            "num_buckets": None,
            "factorize_hash": True,
            "rotations": None,
        },
        earlier_options={"scale": None, "factorize_hash": False},
        self_attention_only=True,
        stream="landmarks",
        shared_query_key=True,
        variables=reformer_variables,
        variable_options={"num_hashes": 2},
    ),
    "bigbird": Attention(
        bigbird_attention,
        options={
            "block_size": 64,
            "num_global_blocks": 2,
            "num_window_blocks": 3,
            "num_random_blocks": 3,
            "global_blocks": "first",
            "pattern": None,
        },
        earlier_options={"global_blocks": "first"},
        self_attention_only=True,
        stream="features",
        variables=bigbird_variables,
    ),
}
NAMES = tuple(REGISTRY)
ATTENTIONS = {name: entry.function for name, entry in REGISTRY.items()}
SPLITTABLE = tuple(name for name, entry in REGISTRY.items() if entry.splittable)


def get_entry(name: str) -> Attention:
    """Returns an attention's registry entry.

    Raises:
      ValueError: if there is no attention of this name.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown attention {name!r}; choose one of: {', '.join(NAMES)}")
    return REGISTRY[name]


def default_options(name: str) -> dict[str, Any]:
    """Returns the options whose default is not None, which are those that configs contain."""
    entry = get_entry(name)
    options = {**entry.variable_options, **entry.options}
    return {option: default for option, default in options.items() if default is not None}


def split_options(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into those of an attention's function and those of its variables.

    An option of both, such as Performer's num_features, appears in both results.

    Raises:
      ValueError: if the attention is unknown or does not have one of the options.
    """
    entry = get_entry(name)
    of_function = {**COMMON_OPTIONS, **entry.options}
    allowed = {**of_function, **entry.variable_options}
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"attention {name!r} has no option {option!r}; it has: {', '.join(allowed)}"
            )
    return (
        {k: v for k, v in options.items() if k in of_function},
        {k: v for k, v in options.items() if k in entry.variable_options},
    )


def layer_variables(
    name: str,
    options: Mapping[str, Any],
    *,
    num_heads: int,
    head_dim: int,
    kv_length: int | None,
    value_dim: int | None = None,
) -> dict[str, VariableSpec]:
    """Describes the arrays that a layer keeps for an attention.

    Args:
      name: the attention, one of NAMES.
      options: options of its function and of its variables.
      num_heads: number of heads.
      head_dim: features of each head of queries and keys.
      kv_length: the maximum number of keys; None if the layer does not know it.
      value_dim: features of each head of the values; None means head_dim.

    Returns:
      A dict from arguments of the function to the descriptions of the arrays.

    Raises:
      ValueError: if the name or an option is unknown, or if kv_length is None but the shape of an
        array depends on it.
    """
    _, variable_options = split_options(name, options)
    return REGISTRY[name].variables(
        num_heads=num_heads,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        kv_length=kv_length,
        **variable_options,
    )


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError or TypeError for an unknown attention or an invalid option.

    It only evaluates shapes and computes nothing.
    """
    function_options, _ = split_options(name, options)
    specs = layer_variables(name, options, num_heads=1, head_dim=8, kv_length=4)
    entry = REGISTRY[name]
    rows = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)
    learned = {
        argument: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
        for argument, spec in specs.items()
        if spec.trained
    }

    def call(query: jax.Array, value: jax.Array, learned: dict[str, jax.Array]) -> jax.Array:
        key = None if entry.shared_query_key else query
        return entry.function(query, key, value, **{**function_options, **learned})

    jax.eval_shape(call, rows, rows, learned)
