"""Computes what the paper's figures show: spectral error, singular values, instability.

Source: Chen, Zeng, Ji, Yang, "Skyformer", NeurIPS 2021: figure 1, appendix E (figure 2) and
appendix F (table 1).
"""

import functools
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention import skyformer_attention

# Parameters on which the embedding does not depend.
_HEAD = ("head_hidden", "head_out")
# Tokens that embedding_change computes at a time, to limit the memory.
_TOKENS = 4096


def skyformer_of_softmax(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Approximates softmax attention by Skyformer's method, as in figure 1 of the paper.

    The matrix exp(scale Q K^T) is completed to that of [Q; K] with itself, which is positive
    semi-definite, and approximated by landmarks; the rows are then divided by their sums. Since

        exp(scale q.k) = exp(scale/2 |q|^2) G(q, k) exp(scale/2 |k|^2)

    and the first factor cancels in the division, this equals skyformer_attention with values
    weighted by the last factor. gamma thus regularises the Gaussian kernel.

    Arrays, mask and output are as in softmax_attention; the options are those of
    skyformer_attention except scale. Rows whose approximate sum is near zero or negative are not
    treated specially.
    """
    half_square = 0.5 * key.shape[-1] ** -0.5 * (key.astype(jnp.float32) ** 2).sum(axis=-1)
    if mask is not None:
        half_square = jnp.where(mask[:, :, None], half_square, -jnp.inf)
    weights = jnp.exp(half_square - half_square.max(axis=1, keepdims=True))[..., None]
    weights = jnp.broadcast_to(weights, value.shape)
    attend = functools.partial(skyformer_attention, query, key, mask=mask, **options)
    sums = attend(weights)  # the same in all columns
    return (attend(weights * value) / sums).astype(value.dtype)


def spectral_norm(matrices: np.ndarray) -> np.ndarray:
    """Computes the largest singular values of [..., rows, columns] in float64.

    A matrix with elements that are not finite gives inf.
    """
    matrices = np.asarray(matrices, np.float64)
    finite = np.isfinite(matrices).all(axis=(-2, -1), keepdims=True)
    norms = np.linalg.norm(np.where(finite, matrices, 0), ord=2, axis=(-2, -1))
    return np.where(finite[..., 0, 0], norms, np.inf)


def spectral_error(approximation: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Computes the spectral norm of an output's error over that of the exact output.

    Both outputs are [batch, length, heads, head_dim]; the result is float64 [batch, heads].
    """
    approximation, exact = (
        np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (approximation, exact)
    )
    return spectral_norm(approximation - exact) / spectral_norm(exact)


def singular_values(outputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Computes the singular values of each example's output at its real tokens, over the greatest.

    Args:
      outputs: [batch, length, width].
      mask: bool [batch, length], True at real tokens.

    Returns:
      float64 [batch, min(length, width)], descending from 1.
    """
    real = np.where(mask[..., None], np.asarray(outputs, np.float64), 0)
    values = np.linalg.svd(real, compute_uv=False)
    return values / values[:, :1]


def outputs_of(
    name: str,
    model: nn.Module,
    variables: Any,
    tokens: jax.Array,
    mask: jax.Array,
    rng: jax.Array | None = None,
) -> list[jax.Array]:
    """Applies a model and returns the outputs of all its modules with that name, in order.

    Args:
      name: query, key or value (each [batch, length, heads, head_dim]), attention_layer or block_0
        ([batch, length, width]), for example.
      model: a classifier without remat.
      variables: the model's variables.
      tokens: int [batch, length], or [batch, 2, length].
      mask: bool, shaped like the tokens.
      rng: a jax.random key for the dropout and the landmarks of training; None leaves both out,
        as in evaluation.

    Raises:
      ValueError: if the model has no module with that name.
    """
    streams = ("landmarks", "dropout")  # the streams that a training step draws from
    _, captured = model.apply(
        variables,
        tokens,
        mask,
        deterministic=rng is None,
        rngs=None if rng is None else dict(zip(streams, jax.random.split(rng), strict=True)),
        capture_intermediates=lambda module, method: (module.name, method) == (name, "__call__"),
        mutable=["intermediates"],
    )
    found = flax.traverse_util.flatten_dict(captured.get("intermediates", {}))
    if not found:
        raise ValueError(f"the model has no module {name!r}")
    return [found[path][0] for path in sorted(found)]


class Change(NamedTuple):
    """How far a model's embedding of a sequence moves, for three ways to take the embedding.

    Attributes:
      normed: after the final norm, as the head pools it.
      raw: before the final norm. There, kernelized attention grows with the length of the sequence,
        because its output is a sum over all keys that is not divided by their number.
      with_noise: like normed, with the dropout and landmarks of training, drawn anew for the
        embeddings before and after. It is mostly the size of this noise.
    """

    normed: jax.Array | float
    raw: jax.Array | float
    with_noise: jax.Array | float


@functools.partial(jax.jit, static_argnames="model")
def embedding_change(
    model: nn.Module, before: Any, after: Any, tokens: jax.Array, mask: jax.Array, rng: jax.Array
) -> Change:
    """Computes ||f(x, W') - f(x, W)||_F^2 of each example, float32 [batch].

    f embeds the real tokens of an example. W and W' are the variables before and after; the model
    and its inputs are as in outputs_of. The jax.random key is only for with_noise.
    """

    def one(example: tuple[jax.Array, jax.Array, jax.Array]) -> Change:
        tokens, mask = (x[None] for x in example[:2])

        def embed(variables: Any, rng: jax.Array) -> Change:
            def output(name: str, rng: jax.Array | None = None) -> jax.Array:
                return outputs_of(name, model, variables, tokens, mask, rng)[0]

            last_block = f"block_{model.num_layers - 1}"
            return Change(output("final_norm"), output(last_block), output("final_norm", rng))

        old, new = map(embed, (before, after), jax.random.split(example[2]))
        real = mask.reshape(*new.raw.shape[:2], 1)
        return jax.tree.map(lambda a, b: jnp.where(real, (a - b) ** 2, 0).sum(), new, old)

    examples = (tokens, mask, jax.random.split(rng, len(tokens)))
    return jax.lax.map(one, examples, batch_size=max(1, _TOKENS // tokens[0].size))


def instability(
    model: nn.Module, before: Any, after: Any, tokens: jax.Array, mask: jax.Array, rng: jax.Array
) -> Change:
    """Computes the instability score of a training step, appendix F of the paper.

    It is ||f(x, W') - f(x, W)||_F^2 / ||W' - W||_F^2, averaged over the examples. f and the
    arguments are as in embedding_change; W are all parameters except the head's, on which f does
    not depend.

    Raises:
      ValueError: if the parameters did not change.
    """
    old, new = (
        {name: of_module for name, of_module in tree["params"].items() if name not in _HEAD}
        for tree in (before, after)
    )
    squares = jax.tree.map(
        lambda a, b: ((np.asarray(b, np.float64) - np.asarray(a, np.float64)) ** 2).sum(), old, new
    )
    distance = sum(jax.tree.leaves(squares))
    if not distance:
        raise ValueError("the parameters are the same before and after")
    change = embedding_change(model, before, after, tokens, mask, rng)
    return Change(*(float(np.asarray(x, np.float64).mean() / distance) for x in change))
