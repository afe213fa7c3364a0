"""The forms of the Gaussian primitive against each other: what gaussian_attention chooses by.

    python -m experiments.benchmarks.gaussian_forms

Output and gradients of the dense form, and of the chunked one with tiles of several sizes, for n
queries and keys, and for n queries and d landmarks and the other way round, as Skyformer's two
passes have them. All sizes have 4,096 tokens in a call, mapped over the examples as training does.
Medians of turns in one process; JSON with commit, versions and hardware.
"""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import flags

from experiments.benchmarks.timing import compile_all, take_turns
from experiments.provenance import provenance, write_json
from skyformer_jax import cli
from skyformer_jax.attention import gaussian

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns that each takes.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "results/gaussian_forms.json", "File to write.")

_TOKENS = 4096
_HEADS, _HEAD_DIM = 2, 32
_LENGTHS = (32, 48, 64, 96, 128, 256, 1024, 4096)
_LANDMARKS = (32, 128)
_TILES = ((256, 128), (512, 128), (1024, 64), (1024, 128), (1024, 512), (2048, 128))


def value_and_gradients(
    implementation: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> Any:
    """The output, and its gradients against itself, each example by itself."""

    def one(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return gaussian.gaussian_attention(
            query[None],
            key[None],
            value[None],
            scale=_HEAD_DIM**-0.5,
            implementation=implementation,
        )[0]

    out, pull = jax.vjp(jax.vmap(one), query, key, value)
    return out, pull(out)


def lower(
    implementation: str, tile: tuple[int, int] | None, inputs: tuple[jax.Array, ...]
) -> jax.stages.Lowered:
    """A form, with the tile in place of the one that it would take."""
    tiles = {jax.default_backend(): tile} if tile else gaussian._TILE
    with mock.patch.object(gaussian, "_TILE", tiles):
        return jax.jit(functools.partial(value_and_gradients, implementation)).lower(*inputs)


def main() -> None:
    """Measures size by size, prints a table and writes the JSON."""
    sizes = {
        (num_queries, num_keys): _TOKENS // max(num_queries, num_keys)
        for n in _LENGTHS
        for d in (*_LANDMARKS, n)
        if d <= n
        for num_queries, num_keys in ((n, d), (d, n))
    }
    cells = []
    for (num_queries, num_keys), batch in sizes.items():
        rows = (num_queries, num_keys, num_keys)
        inputs = tuple(
            jax.random.normal(jax.random.key(i), (batch, n, _HEADS, _HEAD_DIM))
            for i, n in enumerate(rows)
        )
        forms: dict[str, tuple[str, tuple[int, int] | None]] = {
            "dense": ("dense", None),
            "auto": ("auto", None),
            "one tile": ("chunked", (num_queries + num_keys,) * 2),
        }
        if max(rows) > 256:
            forms |= {f"tiles of {x} x {y}": ("chunked", (x, y)) for x, y in _TILES}
        what = f"{num_queries} x {num_keys}"
        programs, compiled = compile_all(
            {name: functools.partial(lower, *form, inputs) for name, form in forms.items()}, what
        )
        turns = take_turns(
            {name: functools.partial(program, *inputs) for name, program in programs.items()},
            _ROUNDS.value,
            what,
        )
        print(f"{num_queries:,} queries, {num_keys:,} keys, {batch} examples")
        for name in forms:
            row = compiled[name] | turns.get(name, {})
            cells.append({"queries": num_queries, "keys": num_keys, "batch": batch, "form": name})
            cells[-1] |= row
            print(
                f"  {name:22}{1e3 * row['median_seconds']:10.2f} ms"
                f"{row['temporaries_bytes'] / 2**20:10,.1f} MiB of temporaries"
            )
    result = {
        "what": "output and gradients of the Gaussian primitive by its forms",
        **provenance(1),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "cells": cells,
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
