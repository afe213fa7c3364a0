"""The paper's encoder: embeddings, pre-norm blocks and pooling."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from skyformer_jax.attention import shards
from skyformer_jax.attention.common import on_automatic_axes, spec_of
from skyformer_jax.attention.random_bits import dropout
from skyformer_jax.layers import (
    MultiHeadAttention,
    dense_inits,
    keeps_statistics,
    sow_statistic,
)
from skyformer_jax.ngrams import hashed_ngrams
from skyformer_jax.norms import LayerNorm

POSITIONS = ("learned", "axial", "sinusoidal_2d", "sinusoidal", "rotary")
SQUARE_POSITIONS = ("axial", "sinusoidal_2d")  # for square images, row by row
POOLINGS = ("mean", "cls", "padded_mean")
DTYPES = ("float32", "bfloat16")
_STREAMS = ("dropout", "landmarks", "features")  # random streams that a block may use
_EMBEDDING_SCALE = 0.02


class EncoderBlock(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both."""

    attention: str
    attention_options: Mapping[str, Any]
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float
    dtype: str
    deterministic: bool
    axis_name: str | None
    rotary: bool = False
    is_causal: bool = False
    decode: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block.

        Args:
          x: [batch, length, width].
          mask: bool [batch, length], True at real tokens, or None.
          segment_ids: int [batch, length], see layers.MultiHeadAttention, or None.

        Returns:
          [batch, length, width].
        """
        dtype = jnp.dtype(self.dtype)

        def drop(y: jax.Array) -> jax.Array:
            if self.deterministic or not self.dropout:
                return y
            return dropout(self.make_rng("dropout"), y, self.dropout, axis_name=self.axis_name)

        y = LayerNorm(dtype, name="attention_norm")(x)
        y = MultiHeadAttention(
            self.attention,
            self.num_heads,
            self.head_dim,
            self.attention_options,
            dtype,
            self.axis_name,
            rotary=self.rotary,
            is_causal=self.is_causal,
            decode=self.decode,
            name="attention_layer",
        )(y, mask=mask, segment_ids=segment_ids)
        x = x + drop(y)
        y = LayerNorm(dtype, name="mlp_norm")(x)

        def dense(features: int, name: str, y: jax.Array) -> jax.Array:
            return nn.Dense(features, dtype=dtype, name=name, **dense_inits(y.shape[-1]))(y)

        y = drop(nn.gelu(dense(self.mlp_dim, "mlp_in", y), approximate=False))
        return x + drop(dense(x.shape[-1], "mlp_out", y))


def pool(x: jax.Array, mask: jax.Array, pooling: str, axis_name: str | None = None) -> jax.Array:
    """Pools each sequence to one vector.

    Args:
      x: [batch, length, width].
      mask: bool [batch, length], True at real tokens.
      pooling: "mean" over the real tokens; "cls", the first token; or "padded_mean", as in the
        published code, the sum over the real tokens divided by the padded length.
      axis_name: the mesh axis over which the length is split, or None.

    Returns:
      [batch, width]; zeros for a mean over no tokens.
    """
    if pooling == "cls":
        first = jnp.where(shards.shard_index(axis_name) == 0, x[:, 0], 0)
        return shards.psum(first, axis_name)
    total = shards.psum(jnp.where(mask[:, :, None], x, 0).sum(axis=1), axis_name)
    if pooling == "padded_mean":
        return total / (x.shape[1] * shards.num_shards(axis_name))
    count = shards.psum(mask.sum(axis=1, keepdims=True, dtype=jnp.int32), axis_name)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def sinusoids(positions: jax.Array, width: int, base: float = 10_000.0) -> jax.Array:
    """Encodes positions as sines and cosines (Vaswani et al., 2017, section 3.5).

    Args:
      positions: int [...].
      width: number of features; must be even.
      base: the wavelengths are 2 pi times powers of it, with exponents from 0 to almost 1.

    Returns:
      float32 [..., width]: sines of width / 2 wavelengths, then the cosines.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even width; got {width}")
    frequencies = base ** (-2 * jnp.arange(width // 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies[(None,) * positions.ndim]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sinusoids_2d(positions: jax.Array, width: int, side: int) -> jax.Array:
    """Encodes pixels of a square image as sines and cosines of their rows and columns.

    Chen, Xie, He (2021, MoCo v3) have them with wavelengths up to 10,000 times 2 pi. These go up to
    the side times 2 pi, so that all features differ within the image.

    Args:
      positions: int [...], the numbers of the pixels, row by row.
      width: number of features; must be divisible by 4.
      side: number of rows, and of columns.

    Returns:
      float32 [..., width]: the sinusoids of the row, then those of the column.
    """
    if width % 4:
        raise ValueError(f"sinusoidal_2d positions need a width divisible by 4; got {width}")
    of_axes = [
        sinusoids(index, width // 2, side) for index in (positions // side, positions % side)
    ]
    return jnp.concatenate(of_axes, axis=-1)


def side_of(max_length: int) -> int:
    """Returns the side of a square image of max_length pixels; raises ValueError for another."""
    side = math.isqrt(max_length)
    if side**2 != max_length:
        raise ValueError(
            f"max_length must be a square number, the pixels of a square image; got {max_length}"
        )
    return side


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Looks up rows of a table [rows, width] for tokens, int [...]; sharded as the tokens are.

    nn.Embed's own call does not specify this sharding, which meshes with explicit axes require.
    """

    def take(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.take(table, tokens, axis=0)

    return on_automatic_axes(take, (*spec_of(tokens), spec_of(table)[1]), table, tokens)


class Encoder(nn.Module):
    """The encoder and the head that both classifiers share.

    The attributes are fields of config.model and config.attention:

    - dtype is the dtype of everything between the embeddings and the final norm. Parameters, the
      statistics of norms, the pooling and the head are float32.
    - remat keeps only the blocks' inputs for the backward pass, which recomputes the rest. With
      remat, dropout drops other elements than without.
    - positions are "learned", a table of max_length x width; "axial", for square images row by row,
      a table of the rows and one of the columns, each sqrt(max_length) x width (Kitaev et al.,
      2020, Reformer, has them side by side instead of added); "sinusoidal_2d", also for square
      images, or "sinusoidal", both without parameters; or "rotary", which rotates queries and keys
      in every block and adds nothing to the embeddings.
    - ngrams are lengths of n-grams. For each of them, a table of ngram_rows rows has an embedding
      of the tokens that end at a position, which is added to the token's; see hashed_ngrams.
    - axis_name is the mesh axis, within jax.shard_map, over which the length is split. Tokens and
      mask are then this device's shard of each sequence, and the logits are the same on all
      devices. init requires None.

    A model that is applied with mutable=["statistics"] also returns mean_square [num_layers], of
    each block's output at real tokens, and with Skyformer residual [num_layers], the means of
    nystrom_residual.

    The methods create submodules, so the compact __call__ of a subclass calls each of them once.
    """

    attention: str
    attention_options: Mapping[str, Any]
    vocab_size: int
    max_length: int
    num_classes: int
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float
    pooling: str
    dtype: str = "float32"
    remat: bool = False
    positions: str = "learned"
    ngrams: Sequence[int] = ()
    ngram_rows: int = 8192
    axis_name: str | None = None

    def __post_init__(self) -> None:
        """Freezes the options, since a dict or a list would keep the module from being hashed."""
        object.__setattr__(self, "attention_options", flax.core.FrozenDict(self.attention_options))
        object.__setattr__(self, "ngrams", tuple(self.ngrams))
        super().__post_init__()

    def _encode(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        positions: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Encodes tokens, mask and positions [batch, length] to pooled features [batch, width]."""
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("positions", self.positions, POSITIONS)
        length = tokens.shape[1] * shards.num_shards(self.axis_name)
        if length == 0:
            raise ValueError(f"sequences must have at least one token; got tokens {tokens.shape}")
        if length > self.max_length:
            raise ValueError(
                f"sequences of {length} tokens do not fit model.max_length={self.max_length}"
            )
        if positions is not None and self.positions == "rotary":
            raise ValueError("the positions of tokens must be consecutive with positions='rotary'")
        x = self._embed(tokens, mask, positions).astype(self.dtype)
        if self.dropout and not deterministic:
            x = dropout(self.make_rng("dropout"), x, self.dropout, axis_name=self.axis_name)
        block = functools.partial(
            EncoderBlock,
            self.attention,
            self.attention_options,
            self.num_heads,
            self.head_dim,
            self.mlp_dim,
            self.dropout,
            self.dtype,
            deterministic,
            self.axis_name,
            self.positions == "rotary",
        )
        if self.remat and not self.is_initializing():
            x, statistics = self._recomputed_blocks(block(parent=None), x, mask)
        else:
            of_blocks = []
            for i in range(self.num_layers):
                layer = block(name=f"block_{i}")
                x = layer(x, mask)
                of_blocks.append(self._statistics(x, mask, layer.variables))
            statistics = jax.tree.map(lambda *values: jnp.stack(values), *of_blocks)
        for name, values in statistics.items():
            sow_statistic(self, name, values)
        x = LayerNorm(jnp.dtype("float32"), name="final_norm")(x)
        return pool(x, mask, self.pooling, self.axis_name)

    def _embed(self, tokens: jax.Array, mask: jax.Array, positions: jax.Array | None) -> jax.Array:
        """Embeds tokens, their n-grams and their positions: float32 [batch, length, width]."""
        init = nn.initializers.normal(_EMBEDDING_SCALE)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")
        x = look_up(embed.embedding, tokens.astype(jnp.int32))
        # Values at masked positions are arbitrary, so they count as token 0.
        real = jnp.where(mask, tokens, 0)
        for n in self.ngrams:
            hashed = functools.partial(
                hashed_ngrams, n=n, num_rows=self.ngram_rows, axis_name=self.axis_name
            )
            table = self.param(
                f"ngram_embedding_{n}", init, (self.ngram_rows, self.width), jnp.float32
            )
            x = x + look_up(table, on_automatic_axes(hashed, spec_of(tokens), real))
        consecutive = shards.positions(tokens.shape[1], self.axis_name)
        if self.positions == "learned":
            table = self.param(
                "position_embedding", init, (self.max_length, self.width), jnp.float32
            )
            if positions is not None:
                return x + look_up(table, positions)
            # A slice is cheaper than a lookup of the positions.
            rows = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=len(consecutive))
            x = x + on_automatic_axes(rows, (None, spec_of(table)[1]), table, consecutive[0])[None]
            return x
        at = consecutive[None] if positions is None else positions
        if self.positions == "axial":
            side = side_of(self.max_length)
            for name, index in (("row_embedding", at // side), ("column_embedding", at % side)):
                table = self.param(name, init, (side, self.width), jnp.float32)
                x = x + look_up(table, index)
        elif self.positions == "sinusoidal_2d":
            # As great as the sum of axial's two tables.
            x = x + 2 * _EMBEDDING_SCALE * sinusoids_2d(at, self.width, side_of(self.max_length))
        elif self.positions == "sinusoidal":
            # Scaled to the root mean square of the token embeddings.
            x = x + _EMBEDDING_SCALE * 2**0.5 * sinusoids(at, self.width)
        return x

    def _statistics(
        self, x: jax.Array, mask: jax.Array, variables: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Returns the statistics of a block, averaged over the examples; {} if none are kept."""
        if not keeps_statistics(self):
            return {}
        square = (x.astype(jnp.float32) ** 2).mean(axis=-1, keepdims=True)
        found = {"mean_square": pool(square, mask, "mean", self.axis_name).mean()}
        sown = variables.get("statistics", {}).get("attention_layer", {})
        return found | {name: values.mean() for name, values in sown.items()}

    def _recomputed_blocks(
        self, block: nn.Module, x: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Applies all blocks in one loop, which keeps only the carried x for the backward pass.

        Without a loop, compilers may merge the recomputation of a block with its first computation,
        as XLA does on CPUs, and then all activations would be kept after all.
        """
        layers = [
            (
                {c: v[f"block_{i}"] for c, v in self.variables.items() if f"block_{i}" in v},
                {s: self.make_rng(s) for s in _STREAMS if self.has_rng(s)},
            )
            for i in range(self.num_layers)
        ]

        @jax.checkpoint
        def step(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            variables, rngs = layer
            mutable = ["statistics"] if keeps_statistics(self) else []
            out, sown = block.apply(variables, x, mask, rngs=rngs, mutable=mutable)
            return out, self._statistics(out, mask, sown)

        return jax.lax.scan(step, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))

    def _head(self, x: jax.Array) -> jax.Array:
        """Maps features [batch, any] to logits [batch, num_classes]."""
        x = nn.relu(nn.Dense(self.mlp_dim, name="head_hidden", **dense_inits(x.shape[-1]))(x))
        return nn.Dense(self.num_classes, name="head_out", **dense_inits(x.shape[-1]))(x)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
