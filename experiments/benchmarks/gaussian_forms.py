"""Compares the forms of the Gaussian primitive; gaussian_attention's choice is based on this.

    python -m experiments.benchmarks.gaussian_forms

Measures output and gradients of the dense form, and of the chunked form with tiles of several
sizes: for n queries and n keys, for n queries and d landmarks, and for d landmarks and n keys, as
in Skyformer's two passes. A call always has 4,096 tokens and is mapped over the examples, as in
training. The forms take turns in one process, and medians are reported. Writes JSON with commit,
versions and hardware. --small uses 256 tokens per call, lengths of 32 and 256, and one round.
"""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from experiments.benchmarks import common_flags
from experiments.benchmarks.timing import as_text, measure_calls
from experiments.records import Row, provenance, write_json
from skyformer_jax import cli
from skyformer_jax.attention import gaussian

_ROUNDS = common_flags.rounds(7)
_SMALL = common_flags.small()
_OUT = common_flags.out("results/gaussian_forms.json")

_HEADS, _HEAD_DIM = 2, 32
_LENGTHS = (32, 48, 64, 96, 128, 256, 1024, 4096)
_LANDMARKS = (32, 128)
_TILES = ((256, 128), (512, 128), (1024, 64), (1024, 128), (1024, 512), (2048, 128))


def value_and_gradients(
    implementation: str, tile: tuple[int, int] | None, *arrays: jax.Array
) -> Any:
    """Computes the output and its vector-Jacobian products with itself, mapped over examples.

    Args:
      implementation: the implementation of gaussian_attention.
      tile: rows of a tile along the longer and the shorter of query and key; None leaves the
        choice to gaussian_attention.
      *arrays: query, key and value, [batch, length, heads, head_dim].
    """

    def one(*arrays: jax.Array) -> jax.Array:
        batch_of_one = (x[None] for x in arrays)
        return gaussian.gaussian_attention(
            *batch_of_one, scale=_HEAD_DIM**-0.5, implementation=implementation
        )[0]

    tiles = dict.fromkeys(gaussian._TILE, tile) if tile else gaussian._TILE
    with mock.patch.object(gaussian, "_TILE", tiles):
        out, pull = jax.vjp(jax.vmap(one), *arrays)
        return out, pull(out)


def measure_size(num_queries: int, num_keys: int, batch: int) -> list[Row]:
    """Measures all forms at one size; returns a row for each."""
    inputs = tuple(
        jax.random.normal(jax.random.key(i), (batch, num_rows, _HEADS, _HEAD_DIM))
        for i, num_rows in enumerate((num_queries, num_keys, num_keys))
    )
    forms: dict[str, tuple[str, tuple[int, int] | None]] = {
        "dense": ("dense", None),
        "auto": ("auto", None),
        "one tile": ("chunked", (num_queries + num_keys,) * 2),
    }
    if max(num_queries, num_keys) > 256:
        forms |= {f"tiles of {x} x {y}": ("chunked", (x, y)) for x, y in _TILES}
    calls = {
        name: (functools.partial(value_and_gradients, *form), inputs)
        for name, form in forms.items()
    }
    size = {"queries": num_queries, "keys": num_keys, "batch": batch}
    rows = measure_calls(calls, _ROUNDS.value, f"{num_queries} x {num_keys}")
    return [{**size, "form": name, **row} for name, row in rows.items()]


def main() -> None:
    """Measures size by size, prints a table and writes the JSON."""
    tokens, lengths = 4096, _LENGTHS
    if _SMALL.value:
        tokens, lengths = 256, (32, 256)
        common_flags.set_defaults(rounds=1)
    # A dict has each size once, in this order.
    sizes = {
        size: None for n in lengths for d in (*_LANDMARKS, n) if d <= n for size in ((n, d), (d, n))
    }
    cells = [row for size in sizes for row in measure_size(*size, tokens // max(size))]
    result = {
        "what": "output and gradients of the Gaussian primitive by its forms",
        **provenance(1),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "small": _SMALL.value,
        "heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "cells": cells,
    }
    write_json(Path(_OUT.value), result)
    print(as_text(cells, "queries", "keys", "form"))


if __name__ == "__main__":
    cli.run(main)
