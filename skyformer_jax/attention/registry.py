"""The table of attentions, and what their signatures say about their options."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skyformer_jax.attention.arrays import Array
from skyformer_jax.attention.bigbird import bigbird_arrays, bigbird_attention
from skyformer_jax.attention.gaussian import kernelized_attention
from skyformer_jax.attention.informer import informer_attention
from skyformer_jax.attention.linformer import linformer_arrays, linformer_attention
from skyformer_jax.attention.nystromformer import nystromformer_arrays, nystromformer_attention
from skyformer_jax.attention.performer import performer_arrays, performer_attention
from skyformer_jax.attention.reformer import reformer_arrays, reformer_attention
from skyformer_jax.attention.skyformer import skyformer_attention
from skyformer_jax.attention.softmax import softmax_attention


def _no_arrays() -> dict[str, Array]:
    return {}


class Attention(NamedTuple):
    """An entry of the table.

    Attributes:
      function: of the common signature.
      arrays: describes what a layer has to keep for the function: keyword-only arguments, among
        them any of num_heads, head_dim and kv_length, the others being options.
      stream: the random stream of a module that feeds its rng: "landmarks" for what training draws
        anew in every step, "features" for what stays as drawn unless that stream is given, None
        where nothing is random.
      shared_query_key: the function takes queries and keys as one, with key=None.
    """

    function: Callable[..., jax.Array]
    arrays: Callable[..., dict[str, Array]] = _no_arrays
    stream: str | None = None
    shared_query_key: bool = False


REGISTRY = {
    "softmax": Attention(softmax_attention),
    "kernelized": Attention(kernelized_attention),
    "skyformer": Attention(skyformer_attention, stream="landmarks"),
    "nystromformer": Attention(nystromformer_attention, nystromformer_arrays),
    "linformer": Attention(linformer_attention, linformer_arrays, stream="features"),
    "informer": Attention(informer_attention, stream="landmarks"),
    "performer": Attention(performer_attention, performer_arrays, stream="features"),
    "reformer": Attention(
        reformer_attention, reformer_arrays, stream="landmarks", shared_query_key=True
    ),
    "bigbird": Attention(bigbird_attention, bigbird_arrays, stream="features"),
}
# Those that run on a sequence that is split over devices.
SPLITTABLE = tuple(
    name
    for name, entry in REGISTRY.items()
    if "axis_name" in inspect.signature(entry.function).parameters
)
ATTENTIONS = {name: entry.function for name, entry in REGISTRY.items()}
NAMES = tuple(REGISTRY)

# Arguments that are no options of a model: a call brings them, or a layer knows them.
_OF_CALLS = (
    *("query", "key", "value", "mask", "query_mask", "full_mask", "bias", "is_causal"),
    "axis_name",
)
_OF_LAYERS = ("num_heads", "head_dim", "kv_length")


def _signatures(name: str) -> tuple[Mapping[str, inspect.Parameter], ...]:
    entry = REGISTRY[name]
    return tuple(inspect.signature(f).parameters for f in (entry.function, entry.arrays))


def default_options(name: str) -> dict[str, Any]:
    """The options of an attention that are numbers, strings or flags, at their defaults."""
    of_function, of_arrays = _signatures(name)
    return {
        option: parameter.default
        for option, parameter in {**of_arrays, **of_function}.items()
        if isinstance(parameter.default, bool | int | float | str) and option not in _OF_CALLS
    }


def split_options(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the function of an attention, and those for its arrays.

    Raises:
      ValueError: if there is no such attention, or it has no such option.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown attention {name!r}; choose one of: {', '.join(NAMES)}")
    of_function, of_arrays = _signatures(name)
    allowed = [x for x in {**of_function, **of_arrays} if x not in (*_OF_CALLS, *_OF_LAYERS)]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"attention {name!r} has no option {option!r}; it has: {', '.join(allowed)}"
            )
    return (
        {k: v for k, v in options.items() if k in of_function},
        {k: v for k, v in options.items() if k in of_arrays},
    )


def layer_arrays(
    name: str, options: Mapping[str, Any], *, num_heads: int, head_dim: int, kv_length: int | None
) -> dict[str, Array]:
    """What a layer has to keep for an attention: name of the argument -> its description.

    Raises:
      ValueError: for an unknown name or option, or if kv_length, the greatest number of keys, is
        None where an array depends on it.
    """
    _, of_arrays = _signatures(name)
    known = {"num_heads": num_heads, "head_dim": head_dim, "kv_length": kv_length}
    needed = {k: v for k, v in known.items() if k in of_arrays}
    if None in needed.values():
        raise ValueError(f"attention {name!r} needs max_length, the greatest number of keys")
    return REGISTRY[name].arrays(**needed, **split_options(name, options)[1])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError for an attention or an option that cannot work, computing nothing."""
    function_options, _ = split_options(name, options)
    layer_arrays(name, options, num_heads=1, head_dim=8, kv_length=4)
    rows = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)

    def call(query: jax.Array, value: jax.Array) -> jax.Array:
        key = None if REGISTRY[name].shared_query_key else query
        return ATTENTIONS[name](query, key, value, **function_options)

    jax.eval_shape(call, rows, rows)
