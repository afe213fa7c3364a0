"""The Gaussian primitive as Pallas kernels for NVIDIA GPUs; see gpu_kernels.

The exponent is a difference of products and norms, and the gradients are differences
W k - (W 1) q. Both sides of each difference are therefore computed from the same rounded numbers.
Arrays that are not bfloat16 are centred before rounding: x - c, where c is the mean of the keys.
This changes no distance.
"""

import functools
from collections.abc import Callable
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


def gpu_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes G(query, key) value.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, value_dim].
      scale: float32 scalar, the kernel's inverse squared width.
      interpret: runs the kernel in Pallas's interpret mode, on any platform.

    Returns:
      float32 [batch, q_length, heads, value_dim].
    """
    call = _runner(query, key, value, scale, interpret)
    (out,) = call(_value_kernel, "gaussian", (query,), (key, value), value.shape[-1:])
    return out.sum(axis=0)


def gpu_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of (gpu_value(query, key, value, scale) * d_out).sum().

    Returns:
      float32 arrays of the shapes of query, key and value.
    """
    call = _runner(query, key, value, scale, interpret)
    dims = query.shape[-1], value.shape[-1]
    rows, columns = (query, d_out), (key, value)
    (d_query,) = call(_query_gradient_kernel, "gaussian_dq", rows, columns, dims[:1])
    d_key, d_value = call(_key_gradients_kernel, "gaussian_dkv", columns, rows, dims)
    return d_query.sum(axis=0), d_key.sum(axis=0), d_value.sum(axis=0)


def _runner(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: jax.Array, interpret: bool
) -> Callable[..., list[jax.Array]]:
    """gpu_kernels.run with the scale, the centre and the precision for these arrays."""
    precision = precision_of(query, key, value)
    exact = precision.exact
    centre = jnp.zeros_like(key[:, :1], jnp.float32) if exact else mean_of_keys(key)
    return functools.partial(
        run, scale=scale, centres=(centre,), precision=precision, interpret=interpret
    )


def _scores(
    rows: jax.Array, columns: jax.Array, scale: jax.Array, precision: Precision
) -> jax.Array:
    """exp(-scale/2 ||x - y||^2) for rows x and columns y."""

    def half_norms(points: jax.Array) -> jax.Array:
        points = points.astype(jnp.float32)
        return 0.5 * (points * points).sum(axis=1)

    norms = half_norms(rows)[:, None] + half_norms(columns)[None, :]
    exponent = (scale * LOG2E) * (matmul(rows, columns.T, precision) - norms)
    return jnp.exp2(jnp.minimum(exponent, 0))  # rounding can make the exponent positive


def _value_kernel(
    scale_ref: Any,
    centre_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    out_ref: Any,
    *,
    num_columns: int,
    turns: int,
    precision: Precision,
) -> None:
    scale, centre = scale_ref[0], centre_ref[...]
    query = centred(query_ref[...], centre, precision)

    def turn(j: jax.Array, out: jax.Array) -> jax.Array:
        here = pl.ds(j * num_columns, num_columns)
        key = centred(key_ref[here, :], centre, precision)
        value = operand(value_ref[here, :], precision)
        scores = operand(_scores(query, key, scale, precision), precision)
        return out + matmul(scores, value, precision)

    out_ref[...] = jax.lax.fori_loop(0, turns, turn, jnp.zeros(out_ref.shape, jnp.float32))


def _query_gradient_kernel(
    scale_ref: Any,
    centre_ref: Any,
    query_ref: Any,
    d_out_ref: Any,
    key_ref: Any,
    value_ref: Any,
    d_query_ref: Any,
    *,
    num_columns: int,
    turns: int,
    precision: Precision,
) -> None:
    """Computes d_query = scale (W k - (W 1) q), with W = S * (d_out v^T)."""
    scale, centre = scale_ref[0], centre_ref[...]
    query = centred(query_ref[...], centre, precision)
    d_out = operand(d_out_ref[...], precision)

    def turn(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w_key, sums = carry
        here = pl.ds(j * num_columns, num_columns)
        key = centred(key_ref[here, :], centre, precision)
        value = operand(value_ref[here, :], precision)
        w = _scores(query, key, scale, precision) * matmul(d_out, value.T, precision)
        w = operand(w, precision)
        return w_key + matmul(w, key, precision), sums + w.astype(jnp.float32).sum(axis=1)

    rows, dim = d_query_ref.shape
    zeros = jnp.zeros((rows, dim), jnp.float32), jnp.zeros((rows,), jnp.float32)
    w_key, sums = jax.lax.fori_loop(0, turns, turn, zeros)
    d_query_ref[...] = scale * (w_key - sums[:, None] * query.astype(jnp.float32))


def _key_gradients_kernel(
    scale_ref: Any,
    centre_ref: Any,
    key_ref: Any,
    value_ref: Any,
    query_ref: Any,
    d_out_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    num_columns: int,
    turns: int,
    precision: Precision,
) -> None:
    """Computes d_key = scale (W^T q - (W^T 1) k) and d_value = S^T d_out.

    Here keys are the rows and queries are the columns.
    """
    scale, centre = scale_ref[0], centre_ref[...]
    key = centred(key_ref[...], centre, precision)
    value = operand(value_ref[...], precision)

    def turn(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w_query, sums, d_value = carry
        here = pl.ds(i * num_columns, num_columns)
        query = centred(query_ref[here, :], centre, precision)
        d_out = operand(d_out_ref[here, :], precision)
        scores = _scores(key, query, scale, precision)
        w = operand(scores * matmul(value, d_out.T, precision), precision)
        scores = operand(scores, precision)
        return (
            w_query + matmul(w, query, precision),
            sums + w.astype(jnp.float32).sum(axis=1),
            d_value + matmul(scores, d_out, precision),
        )

    zeros = (
        jnp.zeros(d_key_ref.shape, jnp.float32),
        jnp.zeros(d_key_ref.shape[:1], jnp.float32),
        jnp.zeros(d_value_ref.shape, jnp.float32),
    )
    w_query, sums, d_value = jax.lax.fori_loop(0, turns, turn, zeros)
    d_key_ref[...] = scale * (w_query - sums[:, None] * key.astype(jnp.float32))
    d_value_ref[...] = d_value
