"""Checks and conversions of arguments that the attention functions share."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def floating_arrays(*inputs: Any) -> tuple[jax.Array, ...]:
    """Converts query, key and value to JAX arrays.

    float64, NumPy's default dtype, becomes float32 unless jax_enable_x64 is set.

    Raises:
      TypeError: if an input is not of a floating dtype. The result of an attention has the dtype
        of value.
    """
    arrays = tuple(jnp.asarray(x) for x in inputs)
    if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in arrays):
        raise TypeError(
            "query, key and value must be arrays of floating numbers; got "
            + ", ".join(str(x.dtype) for x in arrays)
        )
    return arrays


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts NumPy arrays and lists among the options to JAX arrays, scale and gamma to numbers.

    A concrete scale or gamma becomes a Python float, which does not promote dtypes. A traced one,
    which may be a learned parameter, becomes float32.

    Raises:
      TypeError: if scale or gamma is not a number.
      ValueError: if scale or gamma is an array that is not a scalar.
    """
    found = dict(options)
    for name, value in options.items():
        if name in ("scale", "gamma") and value is not None:
            found[name] = _number(name, value)
        elif isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
            found[name] = jnp.asarray(value)
    return found


def _number(name: str, value: Any) -> jax.Array | float:
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be one number; got an array of shape {np.shape(value)}. "
            "If heads need scales of their own, multiply queries and keys by them"
        )
    if isinstance(value, jax.core.Tracer):
        return value.astype(jnp.float32)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {value!r}") from None


def check_not_negative(**numbers: jax.Array | float) -> None:
    """Raises a ValueError for the first number that is negative or NaN; skips traced numbers."""
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not value >= 0:
            raise ValueError(f"{name} must not be negative; got {value}")


def check_mask(mask: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless a mask of keys is bool with shape = [batch, kv_length]."""
    if mask.dtype != jnp.bool_ or mask.shape != shape:
        raise ValueError(
            f"mask must be bool [batch, kv_length] = {shape}, True at real tokens; "
            f"got {mask.dtype} {mask.shape}"
        )


def hide_masked(
    key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Sets key and value to zero at masked positions.

    It selects by the mask instead of multiplying, so NaN and infinity in padding affect neither
    the output nor the gradients.

    Args:
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens, or None if all are real.

    Returns:
      key and value, unchanged at real positions, 0 elsewhere.

    Raises:
      ValueError: if the mask is not boolean or has another shape.
    """
    if mask is None:
        return key, value
    check_mask(mask, key.shape[:2])
    return hide(key, mask), hide(value, mask)


def hide(rows: jax.Array, real: jax.Array) -> jax.Array:
    """Zeros rows [batch, length, heads, head_dim] where real, bool [batch, length], is False."""
    return jnp.where(real[:, :, None, None], rows, 0)


def hide_unseen(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    full_mask: jax.Array | None,
    is_causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Sets key and value to zero at keys that no query may attend to, which may hold NaN.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, kv_heads, head_dim].
      value: [batch, kv_length, kv_heads, value_dim].
      full_mask: the result of check_full_mask, or None.
      is_causal: whether query i attends to keys 0..i only.
    """
    if full_mask is not None:
        seen = jnp.broadcast_to(full_mask.any(axis=(1, 2)), key.shape[:2])
        key, value = hide(key, seen), hide(value, seen)
    if is_causal and key.shape[1] > query.shape[1]:
        seen = (jnp.arange(key.shape[1]) < query.shape[1])[None]
        key, value = hide(key, seen), hide(value, seen)
    return key, value


def equal_head_dims(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pads query, key and value with zero features to the greatest head_dim among them.

    The zeros change neither products nor distances of queries and keys. If value is padded, the
    attention's result has zeros after the features of value.
    """
    head_dim = max(query.shape[-1], value.shape[-1])

    def padded(x: jax.Array) -> jax.Array:
        missing = head_dim - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x

    return padded(query), padded(key), padded(value)


def with_all_axes(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Adds leading axes of length 1 to a mask or bias, so that it has as many axes as the scores.

    Args:
      name: the argument's name, for error messages.
      x: the mask or bias, broadcastable to shape.
      shape: the shape of the scores, [*batch, heads, q_length, kv_length].

    Raises:
      ValueError: if x cannot be broadcast to shape.
    """
    missing = len(shape) - x.ndim
    sizes = (*[1] * missing, *x.shape)
    if missing < 0 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to [batch, heads, q_length, kv_length] = {shape}; "
            f"got {x.shape}"
        )
    return x.reshape(sizes) if missing else x


def check_full_mask(full_mask: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns a full_mask as bool [batch or 1, heads or 1, q_length or 1, kv_length or 1].

    Args:
      full_mask: broadcastable to [batch, heads, q_length, kv_length].
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, kv_heads, head_dim].

    Raises:
      ValueError: if it is not boolean or cannot be broadcast to that shape.
    """
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if full_mask.dtype != jnp.bool_:
        raise ValueError(f"full_mask must be bool; got {full_mask.dtype}")
    return with_all_axes("full_mask", full_mask, shape)


def check_causal(
    name: str,
    query: jax.Array,
    key: jax.Array,
    is_causal: bool,
    segment_ids: jax.Array | None,
) -> None:
    """Raises a ValueError unless the arguments suit causal attention by prefix sums."""
    if not is_causal:
        raise ValueError(
            f"{name} takes segment_ids for causal attention only: set is_causal=True too"
        )
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal {name} attends from a sequence to itself: q_length must equal kv_length; got "
            f"{query.shape[1]} and {key.shape[1]}"
        )
    if segment_ids is not None:
        check_segment_ids(segment_ids, query, key)


def check_segment_ids(segment_ids: jax.Array, query: jax.Array, key: jax.Array) -> None:
    """Raises ValueError unless segment_ids are int [batch, q_length] and q_length == kv_length."""
    integers = jnp.issubdtype(segment_ids.dtype, jnp.integer)
    if not integers or segment_ids.shape != query.shape[:2] or query.shape[1] != key.shape[1]:
        raise ValueError(
            "segment_ids must be int [batch, length], with as many queries as keys; got "
            f"{segment_ids.dtype} {segment_ids.shape} for query {query.shape} and key {key.shape}"
        )


def within_segments(
    full_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
) -> jax.Array | None:
    """Combines a full_mask with segment_ids, which restrict queries to keys of their own segment.

    Args:
      full_mask: broadcastable to [batch, heads, q_length, kv_length], or None.
      segment_ids: int [batch, length], or None.
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, kv_heads, head_dim].

    Returns:
      A full_mask with four axes, or None if both are None.

    Raises:
      ValueError: if the dtype or shape of either is invalid.
    """
    if full_mask is not None:
        full_mask = check_full_mask(full_mask, query, key)
    if segment_ids is None:
        return full_mask
    check_segment_ids(segment_ids, query, key)
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same if full_mask is None else same & full_mask


def zeros_like(x: jax.Array, dtype: Any = None, *, last: int | None = None) -> jax.Array:
    """Returns zeros with the shape and the sharding of x, also on meshes with explicit axes.

    Only some versions of JAX keep such a sharding in jnp.zeros_like. Compilers fold this expression
    into a constant.

    Args:
      x: any array.
      dtype: the dtype of the zeros; None means that of x.
      last: length of the last axis; None means that of x.
    """
    if last is not None and last != x.shape[-1]:
        x = jnp.broadcast_to(x[..., :1], (*x.shape[:-1], last))
    return ((x == x) & False).astype(x.dtype if dtype is None else dtype)


def reshaped(x: jax.Array, shape: tuple[int, ...], new_spec: Callable[[tuple], tuple]) -> jax.Array:
    """Returns x.reshape(shape), with the output sharding that meshes with explicit axes require.

    Args:
      x: any array.
      shape: the shape of the result.
      new_spec: maps the entries of x's PartitionSpec, one per axis, to those of the result.
    """
    sharding = jax.typeof(x).sharding
    if not any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types):
        return x.reshape(shape)
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    out_sharding = NamedSharding(sharding.mesh, PartitionSpec(*new_spec(spec)))
    return jax.lax.reshape(x, shape, out_sharding=out_sharding)


def take_rows(rows: jax.Array, indices: jax.Array) -> jax.Array:
    """Gathers rows of each example, by a method that depends on the platform compiled for.

    Args:
      rows: [batch, rows, heads, head_dim].
      indices: int [batch, d], the same rows for all heads.

    Returns:
      [batch, d, heads, head_dim].
    """
    return jax.lax.platform_dependent(rows, indices, cpu=_take_rows, default=_take_flat_rows)


def _take_rows(rows: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, indices[:, :, None, None], axis=1)


def _take_flat_rows(rows: jax.Array, indices: jax.Array) -> jax.Array:
    """Gathers from rows flattened to [rows, heads * head_dim].

    TPUs pad the last two axes of an array to tiles of 8 x 128. From [rows, heads, head_dim] they
    would gather, and in the gradient scatter, many times as much data. On CPUs the gradient's
    scatter is slower in this form.
    """
    batch, length, heads, head_dim = rows.shape
    rows = reshaped(rows, (batch, length, heads * head_dim), lambda spec: spec[:3])
    taken = jnp.take_along_axis(rows, indices[:, :, None], axis=1)
    shape = (batch, indices.shape[1], heads, head_dim)
    return reshaped(taken, shape, lambda spec: (*spec, None))


def masks_or_all(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, query_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns both masks as arrays, for attentions that summarise queries as well as keys.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], or None if all keys count.
      query_mask: bool [batch, q_length]; None means `mask` where q_length == kv_length
        (self-attention), otherwise all.

    Returns:
      query_mask bool [batch, q_length] and mask bool [batch, kv_length], True at rows that count.

    Raises:
      ValueError: if query_mask is not boolean or has another shape.
    """
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    if query_mask is None:
        same_length = query.shape[1] == key.shape[1]
        query_mask = mask if same_length else jnp.ones(query.shape[:2], bool)
    if query_mask.dtype != jnp.bool_ or query_mask.shape != query.shape[:2]:
        raise ValueError(
            f"query_mask must be bool [batch, q_length] = {query.shape[:2]}; "
            f"got {query_mask.dtype} {query_mask.shape}"
        )
    return query_mask, mask


def check_at_least(least: int, **options: int) -> None:
    """Checks that options are integers of at least `least`.

    Raises:
      TypeError: for the first option that is not an integer, or is traced.
      ValueError: for the first option that is too small.
    """
    for name, value in options.items():
        try:
            too_small = operator.index(value) < least
        except TypeError:
            raise TypeError(
                f"{name} must be an integer, a static argument under jit; got {value!r}"
            ) from None
        if too_small:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def fixed_key() -> jax.Array:
    """Returns the key that functions draw from when rng is None.

    Its draws do not depend on jax_default_prng_impl.
    """
    return jax.random.key(0, impl="threefry2x32")
