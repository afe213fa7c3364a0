"""Attention functions: pure functions from arrays to arrays.

    name_attention(query, key, value, *, mask=None, rng=None, scale=None, ...) -> out

query, key, value and out are [batch, length, heads, head_dim], the layout of
jax.nn.dot_product_attention; mask is bool [batch, kv_length], True at real tokens.
"""

from skyformer_jax.attention.bigbird import bigbird_attention
from skyformer_jax.attention.flax_fn import attention_fn
from skyformer_jax.attention.informer import informer_attention
from skyformer_jax.attention.kernelized import kernelized_attention
from skyformer_jax.attention.linformer import linformer_attention
from skyformer_jax.attention.nystromformer import nystromformer_attention
from skyformer_jax.attention.performer import performer_attention
from skyformer_jax.attention.reformer import reformer_attention
from skyformer_jax.attention.registry import (
    ATTENTIONS,
    NAMES,
    REGISTRY,
    SPLITTABLE,
    check_options,
    default_options,
    layer_variables,
    split_options,
)
from skyformer_jax.attention.residual import nystrom_residual
from skyformer_jax.attention.skyformer import skyformer_attention
from skyformer_jax.attention.softmax import softmax_attention

__all__ = [
    "ATTENTIONS",
    "NAMES",
    "REGISTRY",
    "SPLITTABLE",
    "attention_fn",
    "bigbird_attention",
    "check_options",
    "default_options",
    "informer_attention",
    "kernelized_attention",
    "layer_variables",
    "linformer_attention",
    "nystrom_residual",
    "nystromformer_attention",
    "performer_attention",
    "reformer_attention",
    "skyformer_attention",
    "softmax_attention",
    "split_options",
]
