"""Attentions as pure functions: arrays in, arrays out.

    name_attention(query, key, value, *, mask=None, rng=None, scale=None, ...) -> out

query, key, value and out are [batch, length, heads, head_dim], the layout of
jax.nn.dot_product_attention; mask is bool [batch, kv_length], True at real tokens.
"""

from skyformer_jax.attention.gaussian import kernelized_attention
from skyformer_jax.attention.skyformer import INVERSES, skyformer_attention
from skyformer_jax.attention.softmax import softmax_attention

ATTENTIONS = {
    "softmax": softmax_attention,
    "kernelized": kernelized_attention,
    "skyformer": skyformer_attention,
}
NAMES = tuple(ATTENTIONS)

__all__ = [
    "ATTENTIONS",
    "INVERSES",
    "NAMES",
    "kernelized_attention",
    "skyformer_attention",
    "softmax_attention",
]
