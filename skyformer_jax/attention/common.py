"""The processing of arguments and results that all attention functions share."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from skyformer_jax.attention.inputs import floating_arrays, known_options

Function = TypeVar("Function", bound=Callable[..., jax.Array])


def attention_function(
    *,
    self_attention_only: bool = False,
    shared_query_key: bool = False,
    takes_groups: bool = False,
    takes_explicit_axes: bool = False,
) -> Callable[[Function], Function]:
    """Returns a decorator that adds the behaviour that all attention functions share.

    - Inputs are converted to JAX arrays; a dtype that is not floating raises a TypeError.
    - Shapes are checked, with one message for each mistake.
    - Grouped-query heads: key and value may have fewer heads than query, as in
      jax.nn.dot_product_attention. If query has g times as many, query heads i * g to
      i * g + g - 1 share head i of key and value.
    - If the batch size, the number of queries or the number of keys is 0, the result is zeros.
    - On meshes with explicit axes, the default of jax.make_mesh, the function itself sees
      automatic axes. Its result is sharded like query, except that the last axis is sharded like
      that of value.

    Args:
      self_attention_only: queries and keys must come from the same sequence.
      shared_query_key: the queries also serve as keys, so key must be None or query itself.
      takes_groups: the function itself accepts key and value with fewer heads than query.
        Otherwise their heads are repeated for the query heads that share them.
      takes_explicit_axes: the function itself accepts arrays on explicit axes, because it has
        kernels that must know how arrays are sharded.

    Returns:
      A decorator for functions of query, key, value and keyword arguments.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__.removesuffix("_attention")

        @functools.wraps(function)
        def call(
            query: jax.Array,
            key: jax.Array | None = None,
            value: jax.Array | None = None,
            **options: Any,
        ) -> jax.Array:
            if value is None or (key is None and not shared_query_key):
                needed = "query, None and value" if shared_query_key else "query, key and value"
                raise ValueError(f"{name}_attention needs {needed}")
            if shared_query_key and key is not None and key is not query:
                raise ValueError(
                    f"{name} shares queries and keys: pass them as query, with key=None; got "
                    "another key"
                )
            if key is None or key is query:
                key, (query, value) = None, floating_arrays(query, value)
            else:
                query, key, value = floating_arrays(query, key, value)
            options = known_options(options)
            if shared_query_key:
                _check_shared(name, query, value)
            else:
                check_shapes(query, query if key is None else key, value)
            if self_attention_only:
                _check_self_attention(name, query, value)

            spec = out_spec(query, value)
            if 0 in (*query.shape[:3], *value.shape):
                return on_automatic_axes(_zeros, spec, query, value)
            if not takes_groups:
                key, value = key if key is None else _repeated(key, query), _repeated(value, query)

            def attend(
                query: jax.Array, key: jax.Array | None, value: jax.Array, options: dict[str, Any]
            ) -> jax.Array:
                return function(query, query if key is None else key, value, **options)

            if takes_explicit_axes:
                # The kernels support sharding of the batch and the heads only.
                query = _whole(query, (0, 2))
                key, value = (_divided_as(x, query) for x in (key, value))
                options |= {k: _whole(options[k], (0,)) for k in _MASKS & options.keys()}
                return _resharded(attend(query, key, value, options), spec)
            return on_automatic_axes(attend, spec, query, key, value, options)

        return call  # type: ignore[return-value]

    return decorate


def check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raises a ValueError unless the shapes of query, key and value are consistent."""
    _check_axes(query, key, value)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, length and heads; "
            f"got key {key.shape} and value {value.shape}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "query and key must agree in batch and head_dim; "
            f"got query {query.shape} and key {key.shape}"
        )
    _check_heads("key and value", query, value)


def _check_shared(name: str, query: jax.Array, value: jax.Array) -> None:
    """Raises a ValueError unless the shapes of query, also the key, and value are consistent."""
    _check_axes(query, query, value)
    if query.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"query and value of {name} must agree in batch and length; "
            f"got query {query.shape} and value {value.shape}"
        )
    _check_heads("value", query, value)


def _check_axes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            "query, key and value must be [batch, length, heads, head_dim]; "
            f"got query {query.shape}, key {key.shape} and value {value.shape}"
        )
    if query.shape[3] == 0:
        raise ValueError(f"head_dim of query and key must be at least 1; got query {query.shape}")


def _check_heads(what: str, query: jax.Array, value: jax.Array) -> None:
    if query.shape[2] % max(value.shape[2], 1):
        raise ValueError(
            f"query must have as many heads as {what}, or a multiple of them; "
            f"got {query.shape[2]} and {value.shape[2]}"
        )


def _check_self_attention(name: str, query: jax.Array, value: jax.Array) -> None:
    """Raises a ValueError unless there are as many queries as keys."""
    if query.shape[1] != value.shape[1]:
        raise ValueError(
            f"{name} attends from a sequence to itself: q_length must equal kv_length; got "
            f"{query.shape[1]} and {value.shape[1]}. For cross-attention choose softmax, "
            "kernelized, skyformer, nystromformer, performer or linformer"
        )


_MASKS = {"mask", "query_mask", "full_mask", "segment_ids"}


def _whole(x: Any, divided: tuple[int, ...]) -> Any:
    """Reshards an array so that explicit mesh axes shard only the axes in `divided`.

    None and arrays that are not on explicit axes are returned unchanged.
    """
    if x is None or not _explicit_axes(x):
        return x
    spec = (entry if i in divided else None for i, entry in enumerate(spec_of(x)))
    return _resharded(x, tuple(spec))


def _resharded(x: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
    """Reshards an array to another PartitionSpec if it is on explicit axes."""
    if not _explicit_axes(x) or spec_of(x) == spec:
        return x
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _divided_as(x: Any, query: jax.Array) -> Any:
    """Key or value, or None, with batch and heads sharded like those of query on explicit axes.

    If there are fewer heads than in query and they cannot be sharded that way, they are repeated
    first.
    """
    if x is None or not (_explicit_axes(x) and _explicit_axes(query)):
        return _whole(x, (0, 2))
    batch, _, heads, _ = spec_of(query)
    shape = jax.typeof(query).sharding.mesh.shape
    if x.shape[2] % math.prod(shape[axis] for axis in _axes(heads)):
        x = _repeated(x, query)
    return _resharded(x, (batch, None, heads, None))


def _zeros(query: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.zeros((*query.shape[:3], value.shape[3]), value.dtype)


def repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """Repeats each head of x, [batch, length, kv_heads, head_dim], to get `heads` heads."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _repeated(x: jax.Array, query: jax.Array) -> jax.Array:
    """Key or value with as many heads as query, sharded over heads like query where possible."""
    heads = query.shape[2]
    if x.shape[2] == heads:
        return x
    batch, rows, _, last = spec_of(x)
    taken = {axis for entry in (batch, rows, last) for axis in _axes(entry)}
    of_heads = spec_of(query)[2]
    spec = (batch, rows, None if taken & set(_axes(of_heads)) else of_heads, last)
    return on_automatic_axes(functools.partial(repeat_heads, heads=heads), spec, x)


def on_automatic_axes(function: Callable[..., Any], out_specs: Any, *arguments: Any) -> Any:
    """Calls a function with the explicit axes of the mesh turned into automatic ones.

    The compiler then chooses the shardings of intermediate arrays, and only the sharding of the
    result is prescribed. If no argument is on explicit axes, this is a plain call.

    Args:
      function: takes arrays, or pytrees of arrays and other leaves. It must not close over arrays
        on explicit axes.
      out_specs: a tuple, the entries of the result's PartitionSpec; a list of such tuples if the
        function returns a list.
      *arguments: the function's arguments.

    Returns:
      The result, an array or a list of arrays.
    """
    leaves, structure = jax.tree.flatten(arguments)
    sharded = [i for i, leaf in enumerate(leaves) if _explicit_axes(leaf)]
    if not sharded:
        return function(*arguments)
    mesh = jax.typeof(leaves[sharded[0]]).sharding.mesh
    axes = tuple(dict.fromkeys(axis for i in sharded for axis in _explicit_axes(leaves[i])))

    def on_arrays(*arrays: jax.Array) -> jax.Array:
        found = dict(zip(sharded, arrays, strict=True))
        every = [found.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(structure, every))

    def sharding(spec: tuple[Any, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec))

    several = isinstance(out_specs, list)
    out_sharding = [sharding(s) for s in out_specs] if several else sharding(out_specs)
    automatic = jax.sharding.auto_axes(on_arrays, axes=axes, out_sharding=out_sharding)
    return automatic(*(leaves[i] for i in sharded))


def _explicit_axes(leaf: Any) -> tuple[str, ...]:
    """The explicit axes of the mesh that an array is on; () for any other object."""
    if not isinstance(leaf, jax.Array):
        return ()
    mesh = jax.typeof(leaf).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """Returns the entries of x's PartitionSpec, one per axis, all None without explicit axes."""
    spec = tuple(jax.typeof(x).sharding.spec) if _explicit_axes(x) else ()
    return (*spec, *[None] * (x.ndim - len(spec)))


def out_spec(query: jax.Array, value: jax.Array) -> tuple[Any, ...]:
    """Returns the sharding of an attention's result, as the entries of a PartitionSpec.

    It is that of query, except for the last entry: that of value, or None if query's other entries
    already use one of its mesh axes.
    """
    *rows, _ = spec_of(query)
    last = spec_of(value)[-1]
    taken = {axis for entry in rows for axis in _axes(entry)}
    return (*rows, None if taken & set(_axes(last)) else last)


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
