"""Softmax attention as Pallas kernels for NVIDIA GPUs; see gpu_kernels.

The forward pass keeps a running maximum of the scores and a running sum of the weights of each row
(Milakov and Gimelshein, 2018). Gradients recompute the weights from the logarithm of that sum (Dao
et al., 2022).

The gradients depend on differences between each row's d_out v and their mean over its weights,
which is d_out out. If a row has one large weight, these differences are small. So both sides are
computed from the same rounded numbers. The mean of the keys and that of the values are subtracted
before arrays that are not bfloat16 are rounded: the former changes no weight, and the latter only
adds to the output. Weights are divided by the sum of the rounded weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from skyformer_jax.attention.gpu_kernels import (
    Precision,
    centred,
    matmul,
    operand,
    precision_of,
    run,
)
from skyformer_jax.attention.kernel_inputs import LOG2E, mean_of_keys

# The score of keys that may not be attended to. It is finite so that differences are not NaN.
_LEAST = -1e30


def gpu_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax(scale * query key^T) value, and the logarithm of its normalisation.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim]; finite, also at masked keys.
      value: [batch, kv_length, heads, value_dim]; likewise.
      scale: float32 scalar, factor of the scores.
      mask: bool [batch, kv_length], True at real keys; None if all keys are real.
      is_causal: query i attends to keys 0..i only.
      interpret: runs the kernel in Pallas's interpret mode, on any platform.

    Returns:
      out, float32 [batch, q_length, heads, value_dim], 0 for a query without keys; and lse, float32
      [batch, heads, q_length], the logarithm of the sum of the scores' exponentials, infinity for
      a query without keys, so that exp(score - lse) is 0.
    """
    precision = precision_of(query, key, value)
    centres = mean_of_keys(key), mean_of_keys(value)
    outs, lses = run(
        _value_kernel,
        "softmax",
        (query,),
        (key, value, _kept(key, mask)),
        (value.shape[-1], None),
        scale=scale,
        centres=centres,
        precision=precision,
        interpret=interpret,
        tall=True,
        is_causal=is_causal,
    )
    if len(outs) == 1:
        out, lse = outs[0], lses[0]
    else:
        lse = jax.nn.logsumexp(lses, axis=0)
        out = (jnp.exp(lses - lse[None])[..., None] * outs).sum(axis=0)
    lse = jnp.where(lse > _LEAST / 2, lse + _shift(query, centres[0], scale, precision), jnp.inf)
    return out, jnp.moveaxis(lse, 1, 2)


def gpu_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    is_causal: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of (out * d_out).sum(), where out is the output of gpu_value.

    Args:
      query: as in gpu_value.
      key: likewise.
      value: likewise.
      scale: likewise.
      mask: likewise.
      out: the output of gpu_value.
      lse: the second result of gpu_value.
      d_out: [batch, q_length, heads, value_dim].
      is_causal: as in gpu_value.
      interpret: likewise.

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    precision = precision_of(query, key, value)
    centres = mean_of_keys(key), mean_of_keys(value)
    lse = jnp.moveaxis(lse, 1, 2) - _shift(query, centres[0], scale, precision)
    # sum_j P_ij (d_out_i v_j), from the same rounded d_out and values as the kernels' products.
    d_out = d_out.astype(precision.dtype)
    away = out if precision.exact else out - centres[1]
    mean_change = (operand(d_out, precision).astype(jnp.float32) * away).sum(axis=-1)
    call = functools.partial(
        run,
        scale=scale,
        centres=centres,
        precision=precision,
        interpret=interpret,
        tall=True,
        is_causal=is_causal,
    )
    queries = query, d_out, lse, mean_change
    keys = key, value, _kept(key, mask)
    dims = query.shape[-1], value.shape[-1]
    (d_query,) = call(_query_gradient_kernel, "softmax_dq", queries, keys, dims[:1])
    d_key, d_value = call(_key_gradients_kernel, "softmax_dkv", keys, queries, dims)
    return d_query.sum(axis=0), d_key.sum(axis=0), d_value.sum(axis=0)


def _kept(key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """float32 [batch, kv_length, heads]: 1 at real keys, so that zero padding masks keys."""
    if mask is None:
        return jnp.ones(key.shape[:3], jnp.float32)
    return jnp.broadcast_to(mask[:, :, None].astype(jnp.float32), key.shape[:3])


def _shift(
    query: jax.Array, centre: jax.Array, scale: jax.Array, precision: Precision
) -> jax.Array:
    """How much each query's scores exceed those in the kernels: float32 [batch, length, heads]."""
    if precision.exact:
        return jnp.zeros(query.shape[:3], jnp.float32)
    return scale * (query.astype(jnp.float32) * centre).sum(axis=-1)


def _first_row(num_rows: int) -> jax.Array:
    """The index of this program's first row."""
    return pl.program_id(0) * num_rows


def _first_column(num_columns: int, turns: int) -> jax.Array:
    """The index of the first column of this program's part."""
    return pl.program_id(1) * (turns * num_columns)


def _turns(num_keys: jax.Array, num_columns: int, turns: int, is_causal: bool) -> Any:
    """The number of key blocks to process: if causal, those with the part's first num_keys keys."""
    if not is_causal:
        return turns
    return jnp.minimum(pl.cdiv(jnp.maximum(num_keys, 0), num_columns), turns)


def _scores(
    rows: jax.Array,
    columns: jax.Array,
    scale: jax.Array,
    precision: Precision,
    *,
    kept: jax.Array,
    keys_axis: int,
    first: tuple[jax.Array, jax.Array],
    is_causal: bool,
) -> jax.Array:
    """Computes scores times log2(e) where a query may attend, and _LEAST elsewhere.

    Args:
      rows: operands, queries or keys.
      columns: operands, the other of the two.
      scale: as in gpu_value.
      precision: the precision of the product.
      kept: 1 at keys to attend to, 0 at others.
      keys_axis: the axis of the keys in the scores, 0 or 1.
      first: the positions of the first row and of the first column.
      is_causal: as in gpu_value.
    """
    scores = (scale * LOG2E) * matmul(rows, columns.T, precision)
    scores += jnp.expand_dims((1 - kept) * _LEAST, 1 - keys_axis)
    if is_causal:
        at = [
            first[axis] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)
        ]
        scores = jnp.where(at[keys_axis] <= at[1 - keys_axis], scores, _LEAST)
    return scores


def _value_kernel(
    scale_ref: Any,
    key_centre_ref: Any,
    value_centre_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    kept_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    num_columns: int,
    turns: int,
    precision: Precision,
    is_causal: bool,
) -> None:
    scale = scale_ref[0]
    key_centre, value_centre = key_centre_ref[...], value_centre_ref[...]
    query = operand(query_ref[...], precision)
    num_rows = len(query)
    first_query, first_key = _first_row(num_rows), _first_column(num_columns, turns)

    def turn(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = carry
        here = pl.ds(j * num_columns, num_columns)
        key = centred(key_ref[here, :], key_centre, precision)
        value = centred(value_ref[here, :], value_centre, precision)
        scores = _scores(
            query,
            key,
            scale,
            precision,
            kept=kept_ref[here],
            keys_axis=1,
            first=(first_query, first_key + j * num_columns),
            is_causal=is_causal,
        )
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = operand(jnp.exp2(scores - new_top[:, None]), precision)
        less = jnp.exp2(top - new_top)
        out = less[:, None] * out + matmul(weights, value, precision)
        return out, new_top, less * total + weights.astype(jnp.float32).sum(axis=1)

    init = (
        jnp.zeros(out_ref.shape, jnp.float32),
        jnp.full((num_rows,), _LEAST, jnp.float32),
        jnp.zeros((num_rows,), jnp.float32),
    )
    last = _turns(first_query + num_rows - first_key, num_columns, turns, is_causal)
    out, top, total = jax.lax.fori_loop(0, last, turn, init)
    # If a row has no key at all, each of its weights is exp2(_LEAST - _LEAST) = 1.
    some = top > _LEAST / 2
    total = jnp.where(some, total, 1)
    out /= total[:, None]
    if not precision.exact:
        out += value_centre[None, :]
    out_ref[...] = jnp.where(some[:, None], out, 0)
    lse_ref[...] = jnp.where(some, (top + jnp.log2(total)) / LOG2E, _LEAST)


def _query_gradient_kernel(
    scale_ref: Any,
    key_centre_ref: Any,
    value_centre_ref: Any,
    query_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    mean_change_ref: Any,
    key_ref: Any,
    value_ref: Any,
    kept_ref: Any,
    d_query_ref: Any,
    *,
    num_columns: int,
    turns: int,
    precision: Precision,
    is_causal: bool,
) -> None:
    """Computes d_query = scale W k, with W = P * (d_out v^T - mean_change), whose rows sum to 0."""
    scale = scale_ref[0]
    key_centre, value_centre = key_centre_ref[...], value_centre_ref[...]
    query, d_out = (operand(ref[...], precision) for ref in (query_ref, d_out_ref))
    lse, mean_change = LOG2E * lse_ref[...], mean_change_ref[...]
    num_rows, dim = d_query_ref.shape
    first_query, first_key = _first_row(num_rows), _first_column(num_columns, turns)

    def turn(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w_key, sums = carry
        here = pl.ds(j * num_columns, num_columns)
        key = centred(key_ref[here, :], key_centre, precision)
        value = centred(value_ref[here, :], value_centre, precision)
        scores = _scores(
            query,
            key,
            scale,
            precision,
            kept=kept_ref[here],
            keys_axis=1,
            first=(first_query, first_key + j * num_columns),
            is_causal=is_causal,
        )
        change = matmul(d_out, value.T, precision) - mean_change[:, None]
        w = operand(jnp.exp2(scores - lse[:, None]) * change, precision)
        return w_key + matmul(w, key, precision), sums + w.astype(jnp.float32).sum(axis=1)

    last = _turns(first_query + num_rows - first_key, num_columns, turns, is_causal)
    zeros = jnp.zeros((num_rows, dim), jnp.float32), jnp.zeros((num_rows,), jnp.float32)
    w_key, sums = jax.lax.fori_loop(0, last, turn, zeros)
    if precision.exact:  # the keys are not centred, and the rounded rows of W do not sum to 0
        w_key -= sums[:, None] * key_centre[None, :]
    d_query_ref[...] = scale * w_key


def _key_gradients_kernel(
    scale_ref: Any,
    key_centre_ref: Any,
    value_centre_ref: Any,
    key_ref: Any,
    value_ref: Any,
    kept_ref: Any,
    query_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    mean_change_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    num_columns: int,
    turns: int,
    precision: Precision,
    is_causal: bool,
) -> None:
    """Computes d_key = scale W^T q and d_value = P^T d_out.

    Here keys are the rows and queries are the columns.
    """
    scale = scale_ref[0]
    key = centred(key_ref[...], key_centre_ref[...], precision)
    value = centred(value_ref[...], value_centre_ref[...], precision)
    kept = kept_ref[...]
    first_key, first_query = _first_row(len(key)), _first_column(num_columns, turns)

    def turn(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_key, d_value = carry
        here = pl.ds(i * num_columns, num_columns)
        query, d_out = (operand(ref[here, :], precision) for ref in (query_ref, d_out_ref))
        scores = _scores(
            key,
            query,
            scale,
            precision,
            kept=kept,
            keys_axis=0,
            first=(first_key, first_query + i * num_columns),
            is_causal=is_causal,
        )
        weights = jnp.exp2(scores - LOG2E * lse_ref[here][None, :])
        change = matmul(value, d_out.T, precision) - mean_change_ref[here][None, :]
        w = operand(weights * change, precision)
        weights = operand(weights, precision)
        return d_key + matmul(w, query, precision), d_value + matmul(weights, d_out, precision)

    begin: Any = 0
    if is_causal:
        begin = jnp.minimum(jnp.maximum(first_key - first_query, 0) // num_columns, turns)
    zeros = (jnp.zeros(ref.shape, jnp.float32) for ref in (d_key_ref, d_value_ref))
    d_key, d_value = jax.lax.fori_loop(begin, turns, turn, tuple(zeros))
    d_key_ref[...] = scale * d_key
    d_value_ref[...] = d_value
