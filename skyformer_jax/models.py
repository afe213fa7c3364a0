"""The paper's classifiers: an encoder and an MLP head."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from skyformer_jax.attention.common import on_automatic_axes, spec_of
from skyformer_jax.encoder import Encoder
from skyformer_jax.errors import UserError


def _checked(
    tokens: Any, mask: Any, positions: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Converts tokens, mask and positions to arrays and checks them.

    Raises:
      TypeError: for tokens or positions that are not integers.
      ValueError: for a mask that is not boolean, or a mask or positions of another shape than the
        tokens.
    """
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers; got {tokens.dtype} {tokens.shape}")
    if mask.dtype != jnp.bool_ or mask.shape != tokens.shape:
        raise ValueError(
            f"mask must be bool, of the shape {tokens.shape} of tokens, True at real ones; "
            f"got {mask.dtype} {mask.shape}"
        )
    if positions is None:
        return tokens, mask, None
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers; got {positions.dtype} {positions.shape}")
    if positions.shape != tokens.shape:
        raise ValueError(
            f"positions must have the shape {tokens.shape} of tokens; got {positions.shape}"
        )
    return tokens, mask, positions


class Classifier(Encoder):
    """Classifies sequences of tokens."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Computes the logits of sequences.

        Args:
          tokens: int [batch, length], length at most max_length.
          mask: bool [batch, length], True at real tokens.
          positions: int [batch, length] in 0..max_length - 1, the positions of tokens that are not
            consecutive, such as the pixels of an image that are not black; None: 0..length - 1.
          deterministic: False applies dropout, by the "dropout" random stream.

        Returns:
          float32 [batch, num_classes], logits.

        Raises:
          TypeError: if tokens or positions are not integers.
          ValueError: if the sequences are empty or longer than max_length, if the mask is not
            boolean, if mask or positions have another shape than the tokens, if there are
            positions although the model's are rotary, or for an unknown option.
        """
        tokens, mask, positions = _checked(tokens, mask, positions)
        return self._head(self._encode(tokens, mask, positions, deterministic=deterministic))


class DualClassifier(Encoder):
    """Classifies pairs of documents: one encoder for both, and a head on [a, b, a * b, a - b]."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Computes the logits of pairs of documents.

        Args:
          tokens: int [batch, 2, length], length at most max_length.
          mask: bool [batch, 2, length], True at real tokens.
          positions: int [batch, 2, length], see Classifier.
          deterministic: False applies dropout, by the "dropout" random stream.

        Returns:
          float32 [batch, num_classes], logits.

        Raises:
          TypeError: if tokens are not integers.
          ValueError: if the tokens are not pairs of documents; also see Classifier.
        """
        tokens, mask, positions = _checked(tokens, mask, positions)
        if tokens.ndim != 3 or tokens.shape[1] != 2:
            raise ValueError(f"tokens must be [batch, 2, length], not {list(tokens.shape)}")
        tokens, mask = (_merged(x) for x in (tokens, mask))
        positions = None if positions is None else _merged(positions)
        pooled = self._encode(tokens, mask, positions, deterministic=deterministic)
        a, b = _split(pooled)
        return self._head(jnp.concatenate([a, b, a * b, a - b], axis=-1))


def _merged(x: jax.Array) -> jax.Array:
    """Reshapes [batch, 2, ...] to [batch * 2, ...], sharded as the batch is."""
    spec = (spec_of(x)[0], *spec_of(x)[2:])
    return on_automatic_axes(lambda x: x.reshape(2 * len(x), *x.shape[2:]), spec, x)


def _split(x: jax.Array) -> list[jax.Array]:
    """Splits [batch * 2, width] into two of [batch, width], sharded as the batch is."""
    return on_automatic_axes(lambda x: [x[::2], x[1::2]], [spec_of(x), spec_of(x)], x)


def build_model(
    config: Mapping[str, Any], *, axis_name: str | None = None
) -> Classifier | DualClassifier:
    """Builds the model that a config describes.

    model.apply({"params": params}, tokens, mask, deterministic=True, rngs=...) returns logits
    [batch, num_classes].

    Args:
      config: a dict or an ml_collections.ConfigDict. "attention" holds the name and the options of
        the attention, "model" the attributes of the classes below.
      axis_name: see Classifier.

    Returns:
      A Classifier; or, if num_documents of "model" is 2, a DualClassifier, whose tokens and mask
      are [batch, 2, length].

    Raises:
      UserError: if num_documents is neither 1, the default, nor 2.
    """
    options, fields = dict(config["attention"]), dict(config["model"])
    num_documents = fields.pop("num_documents", 1)
    if num_documents not in (1, 2):
        raise UserError(f"model.num_documents must be 1 or 2, not {num_documents!r}")
    return (DualClassifier if num_documents == 2 else Classifier)(
        attention=options.pop("name"),
        attention_options=flax.core.FrozenDict(options),  # hashable, so that the model is
        **fields,
        axis_name=axis_name,
    )
