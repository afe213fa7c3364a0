"""The Gaussian-kernel primitive, and Kernelized Attention (Chen et al., 2021, section 4.1).

Everything of Skyformer stands on one operation, for p = head_dim:

    G(q, k) v:  out_i = sum_j exp(-scale/2 * ||q_i - k_j||^2) v_j

It is here in two forms that agree to rounding: dense, which holds all scores, and chunked, which
holds those of a tile and has a gradient rule of its own. gaussian_attention chooses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.inputs import check_and_hide_masked, zeros_like

IMPLEMENTATIONS = ("auto", "dense", "chunked")

# Rows of a tile of scores along the longer and along the shorter of query and key. On a CPU a tile
# then stays in the caches, which is measured (docs/speed.md). Accelerators want few, large tiles;
# their figure is a guess until one is at hand, and only bounds the memory.
_TILE = {"cpu": (1024, 128)}
_ACCELERATOR_TILE = (8192, 1024)

# Scores of a head up to which storing them all for the gradient is faster than a second
# computation, on two CPU cores.
_DENSE_SCORES = 128 * 128


def _kernel(
    products: jax.Array, query_norms: jax.Array, key_norms: jax.Array, scale: jax.Array | float
) -> jax.Array:
    """exp(-scale/2 ||q - k||^2) from q.k, ||q||^2 and ||k||^2."""
    exponent = scale * (products - 0.5 * (query_norms + key_norms))
    return jnp.exp(jnp.minimum(exponent, 0))  # rounding alone can make it positive


def gaussian_scores(query: jax.Array, key: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Gaussian kernel values exp(-scale/2 * ||q_i - k_j||^2).

    The product is taken at the highest precision: the exponent is a difference of larger numbers,
    and what TF32 or bfloat16 would lose in it comes out multiplied.

    Args:
      query: float32 [batch, q_length, heads, head_dim].
      key: float32 [batch, kv_length, heads, head_dim].
      scale: the kernel's inverse squared width.

    Returns:
      float32 [batch, heads, q_length, kv_length], in 0..1.
    """
    products = jnp.einsum("bqhp,bkhp->bhqk", query, key, precision=jax.lax.Precision.HIGHEST)
    query_norms = jnp.einsum("bqhp,bqhp->bhq", query, query)[..., :, None]
    key_norms = jnp.einsum("bkhp,bkhp->bhk", key, key)[..., None, :]
    return _kernel(products, query_norms, key_norms, scale)


def gaussian_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: jax.Array | float,
    implementation: str = "auto",
) -> jax.Array:
    """G(query, key) value.

    Args:
      query: [batch, q_length, heads, head_dim].
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim]; 0 where masked, which is all that a mask has to
        do here, since nothing normalises the sum.
      scale: the kernel's inverse squared width.
      implementation: "dense" holds all q_length x kv_length scores, and again for gradients;
        "chunked" holds a tile of them at a time and computes it anew in the backward pass, so that
        memory is linear in q_length + kv_length for gradients too (of reverse mode; forward mode
        is not defined); "auto" is dense for the smallest sizes, where that is faster.

    Returns:
      float32 [batch, q_length, heads, head_dim], computed in float32.

    Raises:
      ValueError: for another implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    q_length, kv_length = query.shape[1], key.shape[1]
    few = q_length * kv_length <= _DENSE_SCORES
    if implementation == "dense" or (implementation == "auto" and few):
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        return jnp.einsum("bhqk,bkhp->bqhp", gaussian_scores(query, key, scale), value)

    long, short = _TILE.get(jax.default_backend(), _ACCELERATOR_TILE)
    if q_length < kv_length:
        query_rows, key_rows = _rows(q_length, short), _rows(kv_length, long)
    else:
        query_rows, key_rows = _rows(q_length, long), _rows(kv_length, short)
    # Padded values and, in the backward pass, gradients are 0: such rows add nothing.
    out = _chunked(
        _pad(query, query_rows),
        _pad(key, key_rows),
        _pad(value, key_rows),
        jnp.asarray(scale, jnp.float32),
        query_rows,
        key_rows,
    )
    return out[:, :q_length]


def _rows(length: int, limit: int) -> int:
    """Rows of each of the fewest equal blocks that hold length rows, limit being the most."""
    num_blocks = max(1, -(-length // limit))
    rows = -(-length // num_blocks)
    return max(1, rows if num_blocks == 1 else -(-rows // 8) * 8)


def _pad(array: jax.Array, rows: int) -> jax.Array:
    """Zeros after axis 1, up to a multiple of rows."""
    missing = -array.shape[1] % rows
    return jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else array


# Within the chunked form blocks are float32 [batch, heads, rows, head_dim], whatever the arrays: no
# copy of those in float32 has to exist, and the products are plain.


def _block(array: jax.Array, index: jax.Array | int, rows: int) -> jax.Array:
    """Block index of [batch, length, heads, head_dim]."""
    block = jax.lax.dynamic_slice_in_dim(array, index * rows, rows, axis=1)
    return jnp.swapaxes(block, 1, 2).astype(jnp.float32)


def _put(array: jax.Array, block: jax.Array, index: jax.Array | int) -> jax.Array:
    """The array with its block index replaced."""
    rows = block.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(
        array, jnp.swapaxes(block, 1, 2), index * rows, axis=1
    )


def _add(array: jax.Array, block: jax.Array, index: jax.Array | int) -> jax.Array:
    """The array with something added to its block index."""
    return _put(array, _block(array, index, block.shape[2]) + block, index)


def _loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carry after body(0, carry), body(1, ...), ...; a loop only for more than one turn."""
    if count > 1:
        return jax.lax.fori_loop(0, count, body, carry)
    return body(0, carry) if count else carry


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _tile_scores(query: jax.Array, key: jax.Array, scale: jax.Array) -> jax.Array:
    """Scores [batch, heads, query rows, key rows] of two blocks."""
    products = jnp.matmul(query, _transposed(key), precision=jax.lax.Precision.HIGHEST)
    query_norms = (query * query).sum(axis=-1)[..., :, None]
    key_norms = (key * key).sum(axis=-1)[..., None, :]
    return _kernel(products, query_norms, key_norms, scale)


def _tile_gradients(
    query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """W k, W 1, W^T q and S^T d_out for scores S and W = S * (d_out v^T).

    The tile lies with its longer side in rows, which suits the matrix products.
    """
    if query.shape[2] >= key.shape[2]:
        s = _tile_scores(query, key, scale)
        w = s * (d_out @ _transposed(value))
        sums = w.sum(axis=-1)[..., None]
        return w @ key, sums, _transposed(w) @ query, _transposed(s) @ d_out
    s = _tile_scores(key, query, scale)
    w = s * (value @ _transposed(d_out))
    sums = w.sum(axis=-2)[..., None]
    return _transposed(w) @ key, sums, w @ query, s @ d_out


def _chunked_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    query_rows: int,
    key_rows: int,
) -> jax.Array:
    def by_query(i: jax.Array, out: jax.Array) -> jax.Array:
        queries = _block(query, i, query_rows)

        def by_key(j: jax.Array, sums: jax.Array) -> jax.Array:
            scores = _tile_scores(queries, _block(key, j, key_rows), scale)
            return sums + scores @ _block(value, j, key_rows)

        sums = _loop(key.shape[1] // key_rows, by_key, zeros_like(queries))
        return _put(out, sums, i)

    return _loop(query.shape[1] // query_rows, by_query, zeros_like(query, jnp.float32))


_chunked = jax.custom_vjp(_chunked_value, nondiff_argnums=(4, 5))


def _keeping_arrays(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The first half of a gradient rule: the function, and its first four arguments to keep."""

    def forward(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*arguments), arguments[:4]

    return forward


def _chunked_backward(
    query_rows: int, key_rows: int, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    """The gradients, tile by tile.

    With S the scores and W = S * (d_out v^T), elementwise, they are d_v = S^T d_out,
    d_q = scale (W k - (W 1) q) and d_k = scale (W^T q - (W^T 1) k). No tile has to add up W^T 1: it
    is v . d_v, row by row. And as G depends on sqrt(scale) q and sqrt(scale) k alone,
    d_scale = (q . d_q + k . d_k) / (2 scale).
    """
    query, key, value, scale = residuals

    def by_query(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = gradients
        queries, d_outs = (_block(x, i, query_rows) for x in (query, d_out))

        def by_key(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            w_keys, w_sums, d_key, d_value = carry
            keys, values = (_block(x, j, key_rows) for x in (key, value))
            w_k, w_1, wt_q, st_d_out = _tile_gradients(queries, keys, values, d_outs, scale)
            return w_keys + w_k, w_sums + w_1, _add(d_key, wt_q, j), _add(d_value, st_d_out, j)

        zeros = zeros_like(queries)
        w_keys, w_sums, d_key, d_value = _loop(
            key.shape[1] // key_rows, by_key, (zeros, zeros[..., :1], d_key, d_value)
        )
        return _put(d_query, scale * (w_keys - w_sums * queries), i), d_key, d_value

    zeros = tuple(zeros_like(x, jnp.float32) for x in (query, key, value))
    d_query, d_key, d_value = _loop(query.shape[1] // query_rows, by_query, zeros)
    d_key = scale * (d_key - (value * d_value).sum(axis=-1, keepdims=True) * key)
    d_scale = ((query * d_query).sum() + (key * d_key).sum()) / (2 * scale)
    gradients = (d_query, d_key, d_value, d_scale)
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, residuals, strict=True))


_chunked.defvjp(_keeping_arrays(_chunked_value), _chunked_backward)


# For keys and values that are split over devices: they go round a ring, past the queries of each.
# The rule for gradients sends them round again, with their gradients, instead of keeping every part
# that passed.


def _ring_value(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    axis_name: str,
    implementation: str,
) -> jax.Array:
    def turn(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, key, value = carry
        out += gaussian_attention(query, key, value, scale=scale, implementation=implementation)
        return out, *shards.ring_shift((key, value), axis_name)

    zeros = zeros_like(query, jnp.float32)
    return jax.lax.fori_loop(0, shards.num_shards(axis_name), turn, (zeros, key, value))[0]


_ring = jax.custom_vjp(_ring_value, nondiff_argnums=(4, 5))


def _ring_backward(
    axis_name: str, implementation: str, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    query, key, value, scale = residuals

    def turn(_: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        (d_query, d_scale), (key, value, d_key, d_value) = carry

        def of_part(*arguments: jax.Array) -> jax.Array:
            query, key, value, scale = arguments
            return gaussian_attention(query, key, value, scale=scale, implementation=implementation)

        g_query, g_key, g_value, g_scale = jax.vjp(of_part, query, key, value, scale)[1](d_out)
        passing = (key, value, d_key + g_key, d_value + g_value)
        return (d_query + g_query, d_scale + g_scale), shards.ring_shift(passing, axis_name)

    d_query, d_key, d_value, d_scale = (
        zeros_like(x, jnp.float32) for x in (query, key, value, scale)
    )
    carry = (d_query, d_scale), (key, value, d_key, d_value)
    (d_query, d_scale), (_, _, d_key, d_value) = jax.lax.fori_loop(
        0, shards.num_shards(axis_name), turn, carry
    )
    gradients = (d_query, d_key, d_value, d_scale)
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, residuals, strict=True))


_ring.defvjp(_keeping_arrays(_ring_value), _ring_backward)


def kernelized_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    axis_name: str | None = None,
) -> jax.Array:
    """Kernelized Attention: the Gaussian kernel in place of softmax, exact and quadratic.

    out_i = sum_j exp(-scale/2 ||q_i - k_j||^2) v_j over the real keys j (Chen et al., 2021,
    equation 4). It is not normalised: the output grows with the number of keys near a query.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: unused, nothing here is random; part of the common signature.
      scale: the kernel's inverse squared width; None means head_dim**-0.5.
      implementation: "auto", "dense" or "chunked", see gaussian_attention.
      axis_name: name of a mesh axis, within jax.shard_map: each device has a run of the sequence,
        as long as the others', of query, key, value and mask. Keys and values go round the devices
        once, and again for gradients; no device ever holds more than two parts.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value, computed in float32; zeros for an
      example without any real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or the implementation is unknown.
    """
    del rng
    dtype = value.dtype
    key, value = check_and_hide_masked(query, key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if axis_name is None:
        out = gaussian_attention(query, key, value, scale=scale, implementation=implementation)
    else:
        ring_scale = jnp.asarray(scale, jnp.float32)
        out = _ring(query, key, value, ring_scale, axis_name, implementation)
    return out.astype(dtype)
