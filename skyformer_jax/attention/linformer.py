"""Linformer (Wang et al., 2020): projects the length of keys and values to k.

With learned E and F, [kv_length, k] (equation 7; the paper's E and F are the transposes),

    out = softmax(Q (E^T K)^T s) (F^T V).
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import attention_function
from skyformer_jax.attention.inputs import check_at_least, fixed_key, hide_masked
from skyformer_jax.attention.softmax import softmax_attention
from skyformer_jax.attention.variables import VariableSpec

SHARINGS = ("headwise", "key-value", "none")


@attention_function()
def linformer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    num_features: int = 128,
    key_projection: jax.Array | None = None,
    value_projection: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Linformer attention, linear in the length.

    Masked keys and values are set to zero before they are projected, and a feature to which no real
    token contributes is masked too. So with the identity as both projections it equals
    softmax_attention, also with masks.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens; any pattern.
      rng: a jax.random key to draw projections that are None; None means a fixed key.
      scale: factor of the scores; None means head_dim**-0.5.
      num_features: k of projections that are None.
      key_projection: E, float [length, k] or [heads, length, k], length at least kv_length (the
        first kv_length rows are used); None draws it as linformer_variables does, as in the paper's
        theorem 2, which is about random projections.
      value_projection: F, likewise; None means E if E is given, otherwise F is drawn too.
      axis_name: name of a mesh axis, within jax.shard_map. Each device then holds a run of the
        sequence, of the same length, of query, key, value and mask, and the whole projections. Only
        the projected keys and values and the counts of real tokens cross devices.

    Returns:
      [batch, q_length, heads, head_dim] in the dtype of value; zeros for an example without any
      real key.

    Raises:
      ValueError: if shapes do not fit, the mask is not boolean, or num_features is less than 1.
    """
    check_at_least(1, num_features=num_features)
    key, value = hide_masked(key, value, mask)
    _, rows_here, heads, _ = key.shape
    kv_length = rows_here * shards.num_shards(axis_name)
    if key_projection is None:
        keys = jax.random.split(fixed_key() if rng is None else rng)
        draw = _init(kv_length)
        key_projection = draw(keys[0], (kv_length, num_features))
        if value_projection is None:
            value_projection = draw(keys[1], (kv_length, num_features))
    elif value_projection is None:
        value_projection = key_projection
    key_projection, value_projection = (
        _first_rows(name, projection, kv_length, heads)
        for name, projection in (
            ("key_projection", key_projection),
            ("value_projection", value_projection),
        )
    )
    if key_projection.shape[-1] != value_projection.shape[-1]:
        raise ValueError(
            "key_projection and value_projection must have the same number of features; got "
            f"{key_projection.shape} and {value_projection.shape}"
        )

    if axis_name is not None:
        first = shards.shard_index(axis_name) * rows_here
        key_projection, value_projection = (
            jax.lax.dynamic_slice_in_dim(x, first, rows_here, axis=-2)
            for x in (key_projection, value_projection)
        )

    def project(rows: jax.Array, projection: jax.Array) -> jax.Array:
        per_head = "h" if projection.ndim == 3 else ""
        projected = jnp.einsum(
            f"bnhp,{per_head}nk->bkhp", rows.astype(jnp.float32), projection.astype(jnp.float32)
        )
        return shards.psum(projected, axis_name).astype(rows.dtype)

    features = None
    if mask is not None:
        touched = ((key_projection != 0) | (value_projection != 0)).astype(jnp.float32)
        touched = touched if touched.ndim == 3 else touched[None]
        count = jnp.einsum("bn,hnk->bhk", mask.astype(jnp.float32), touched)
        count = shards.psum(count, axis_name)
        features = (count > 0)[:, :, None, :]
    return softmax_attention(
        query,
        project(key, key_projection),
        project(value, value_projection),
        full_mask=features,
        scale=scale,
    )


def _first_rows(name: str, projection: jax.Array, kv_length: int, heads: int) -> jax.Array:
    rows = projection.shape[-2] if projection.ndim > 1 else 0
    if projection.ndim not in (2, 3) or (projection.ndim == 3 and len(projection) != heads):
        raise ValueError(
            f"{name} must be [length, features] or [heads = {heads}, length, features]; "
            f"got {projection.shape}"
        )
    if rows < kv_length:
        raise ValueError(f"{name} is for {rows} tokens at most; got {kv_length}")
    return projection[..., :kv_length, :]


def _init(kv_length: int) -> jax.nn.initializers.Initializer:
    # Sums over kv_length independent keys of unit variance then have unit variance.
    return jax.nn.initializers.normal(max(1, kv_length) ** -0.5, jnp.float32)


def linformer_variables(
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    kv_length: int | None,
    num_features: int = 128,
    sharing: str = "headwise",
) -> dict[str, VariableSpec]:
    """Describes the learned projections, shared in one of the paper's three ways (section 4).

    Args:
      num_heads: number of heads.
      head_dim: unused; part of the common signature.
      value_dim: likewise.
      kv_length: the maximum number of keys.
      num_features: k of the projections.
      sharing: "headwise": one E and one F for all heads; "key-value": one E for both and for all
        heads; "none": an E and an F for each head.

    Raises:
      ValueError: if kv_length is None or an option is out of range.
    """
    del head_dim, value_dim
    if kv_length is None:
        raise ValueError("attention 'linformer' needs max_length, the maximum number of keys")
    if sharing not in SHARINGS:
        raise ValueError(f"sharing must be one of {', '.join(SHARINGS)}; got {sharing!r}")
    check_at_least(1, num_features=num_features)
    one_head = (kv_length, num_features)
    shape = (num_heads, *one_head) if sharing == "none" else one_head
    projection = VariableSpec(shape, _init(kv_length), trained=True)
    if sharing == "key-value":
        return {"key_projection": projection}
    return {"key_projection": projection, "value_projection": projection}
