"""What the paper's figures measure: spectral error, singular values, instability.

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
# Tokens that embedding_change computes at a time, for the memory.
_TOKENS = 4096


def skyformer_of_softmax(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Softmax attention by Skyformer's method, as figure 1 of the paper compares it with others.

    The matrix exp(scale Q K^T) is completed to that of [Q; K] with itself, which is positive
    semi-definite, and approximated by landmarks; the rows are then divided by their sums. Since

        exp(scale q.k) = exp(scale/2 |q|^2) G(q, k) exp(scale/2 |k|^2)

    and the first factor cancels in the division, that is skyformer_attention of values weighted by
    the last factor; gamma is thus a regularisation of the Gaussian kernel.

    Args:
      query: [batch, q_length, heads, head_dim], unscaled.
      key: [batch, kv_length, heads, head_dim].
      value: [batch, kv_length, heads, head_dim].
      mask: bool [batch, kv_length], True at real tokens.
      **options: of skyformer_attention, but scale.

    Returns:
      As softmax_attention. Nothing is done where the approximate sum of a row comes near zero, or
      below it.
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
    """Largest singular values of [..., rows, columns], in float64; inf if one is not finite."""
    matrices = np.asarray(matrices, np.float64)
    finite = np.isfinite(matrices).all(axis=(-2, -1), keepdims=True)
    norms = np.linalg.norm(np.where(finite, matrices, 0), ord=2, axis=(-2, -1))
    return np.where(finite[..., 0, 0], norms, np.inf)


def spectral_error(approximation: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Spectral norm of the error of an attention's output, relative to that of the exact output.

    Args:
      approximation: [batch, length, heads, head_dim].
      exact: likewise.

    Returns:
      float64 [batch, heads].
    """
    error = np.asarray(approximation, np.float64) - np.asarray(exact, np.float64)
    error, exact = (np.moveaxis(np.asarray(x), 2, 1) for x in (error, exact))
    return spectral_norm(error) / spectral_norm(exact)


def singular_values(outputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Singular values of each example's output at its real tokens, over the greatest of them.

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
    """The outputs of all modules of that name when the model is applied, in their order.

    Args:
      name: query, key or value (each [batch, length, heads, head_dim]), attention_layer or block_0
        ([batch, length, width]), for example.
      model: a classifier without remat.
      variables: of the model.
      tokens: as the model takes them.
      mask: likewise.
      rng: a jax.random key for the dropout and the landmarks of training; None leaves both out,
        as in evaluation.

    Raises:
      ValueError: if there is no such module.
    """
    streams = ("landmarks", "dropout")  # those that a training step draws
    rngs = {} if rng is None else dict(zip(streams, jax.random.split(rng), strict=True))
    _, captured = model.apply(
        variables,
        tokens,
        mask,
        deterministic=rng is None,
        rngs=rngs,
        capture_intermediates=lambda module, method: (module.name, method) == (name, "__call__"),
        mutable=["intermediates"],
    )
    found = flax.traverse_util.flatten_dict(captured.get("intermediates", {}))
    if not found:
        raise ValueError(f"the model has no module {name!r}")
    return [found[path][0] for path in sorted(found)]


class Change(NamedTuple):
    """How far a model's embedding of a sequence moves; how the embedding is taken matters.

    Attributes:
      normed: after the final norm, which is what the head pools; its size is that of one token.
      raw: before it, as the last block returns it. There kernelized attention, whose output is a
        sum over all keys that nothing divides by their number, is larger the longer the sequence.
      with_noise: as normed, with dropout and landmarks as in training, which are drawn anew for
        the embedding before and for that after. This is mostly the size of that noise.
    """

    normed: jax.Array | float
    raw: jax.Array | float
    with_noise: jax.Array | float


@functools.partial(jax.jit, static_argnames="model")
def embedding_change(
    model: nn.Module, before: Any, after: Any, tokens: jax.Array, mask: jax.Array, rng: jax.Array
) -> Change:
    """||f(x, W') - f(x, W)||_F^2 of each example, f being the embedding of its real tokens.

    Args:
      model: a classifier without remat.
      before: the variables W.
      after: the variables W'.
      tokens: int [batch, length], or [batch, 2, length].
      mask: bool, likewise.
      rng: a jax.random key, for with_noise alone.

    Returns:
      float32 [batch] each.
    """
    normed, raw = "final_norm", f"block_{model.num_layers - 1}"

    def one(example: tuple[jax.Array, jax.Array, jax.Array]) -> Change:
        tokens, mask = (x[None] for x in example[:2])

        def embed(variables: Any, rng: jax.Array) -> Change:
            return Change(
                normed=outputs_of(normed, model, variables, tokens, mask)[0],
                raw=outputs_of(raw, model, variables, tokens, mask)[0],
                with_noise=outputs_of(normed, model, variables, tokens, mask, rng)[0],
            )

        keys = jax.random.split(example[2])
        old, new = embed(before, keys[0]), embed(after, keys[1])
        real = mask.reshape(*new.raw.shape[:2], 1)
        return jax.tree.map(lambda a, b: jnp.where(real, (a - b) ** 2, 0).sum(), new, old)

    at_a_time = max(1, _TOKENS // tokens[0].size)
    keys = jax.random.split(rng, len(tokens))
    return jax.lax.map(one, (tokens, mask, keys), batch_size=at_a_time)


def instability(
    model: nn.Module, before: Any, after: Any, tokens: jax.Array, mask: jax.Array, rng: jax.Array
) -> Change:
    """The instability score of a training step, appendix F of the paper.

    ||f(x, W') - f(x, W)||_F^2 / ||W' - W||_F^2, with f as in embedding_change and W all parameters
    but the head's, on which f does not depend.

    Args:
      model: as of embedding_change, like the others.
      before: the variables before the step.
      after: the variables after it.
      tokens: of the step's batch, or of some of its examples.
      mask: likewise.
      rng: a jax.random key, for with_noise alone.

    Returns:
      The scores, means over the examples.

    Raises:
      ValueError: if the parameters did not change.
    """
    old, new = (
        jax.tree.leaves({k: v for k, v in tree["params"].items() if k not in _HEAD})
        for tree in (before, after)
    )
    distance = sum(
        float(((np.asarray(b, np.float64) - np.asarray(a, np.float64)) ** 2).sum())
        for a, b in zip(old, new, strict=True)
    )
    if not distance:
        raise ValueError("the parameters are the same before and after")
    change = embedding_change(model, before, after, tokens, mask, rng)
    return Change(*(float(np.asarray(x, np.float64).mean() / distance) for x in change))
