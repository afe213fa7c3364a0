"""Measures where Skyformer approximates Kernelized Attention, and how nystrom_residual shows it.

    python -m experiments.benchmarks.approximation

Queries and keys are normal with a standard deviation from 0.25 to 4; 1/sqrt(3) is that of a new
layer of skyformer_jax after a layer norm. Values are normal. A row has the residual and, in the
Frobenius norm relative to the output of kernelized_attention, the error of skyformer_attention, the
norm of its output, and the error that the Schulz iteration adds to that of the exact inverse.
--small uses 128 tokens and two spreads.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarks import common_flags
from experiments.records import Row, provenance, write_json
from skyformer_jax import cli
from skyformer_jax.attention import kernelized_attention, nystrom_residual, skyformer_attention

_SMALL = common_flags.small()
_OUT = common_flags.out("results/approximation.json")

_BATCH, _LENGTH, _HEADS, _HEAD_DIM = 4, 1024, 2, 32
_SPREADS = (0.25, 0.5, 3**-0.5, 0.75, 1.0, 2.0, 4.0)
_LANDMARKS = (32, 128, 512)


def measure(spread: float, num_landmarks: int, length: int) -> Row:
    """Measures one row, with uniform landmarks at the same positions in all heads and examples."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (
        jax.random.normal(k, (_BATCH, length, _HEADS, _HEAD_DIM)) for k in keys[:3]
    )
    query, key = spread * query, spread * key
    options = {"num_landmarks": num_landmarks, "rng": keys[3]}
    exact = kernelized_attention(query, key, value)
    solved = skyformer_attention(query, key, value, inverse="cholesky", **options)
    iterated = skyformer_attention(query, key, value, **options)
    norm = jnp.linalg.norm(exact)
    return {
        "spread": spread,
        "landmarks": num_landmarks,
        "residual": float(nystrom_residual(query, key, **options).mean()),
        "error": float(jnp.linalg.norm(iterated - exact) / norm),
        "norm": float(jnp.linalg.norm(iterated) / norm),
        "error_of_inverse": float(jnp.linalg.norm(iterated - solved) / norm),
    }


def main() -> None:
    """Measures, prints a table and writes the JSON."""
    length, spreads = (128, (0.25, 1.0)) if _SMALL.value else (_LENGTH, _SPREADS)
    with jax.default_matmul_precision("highest"):
        rows = [measure(s, d, length) for d in _LANDMARKS if d < length for s in spreads]
    result = {
        "what": "error of Skyformer to Kernelized Attention, and its Nystrom residual",
        **provenance(1),
        "seed": 0,
        "small": _SMALL.value,
        "shape": [_BATCH, length, _HEADS, _HEAD_DIM],
        "rows": rows,
    }
    write_json(Path(_OUT.value), result)
    print(*rows[0])
    for row in rows:
        print(*(f"{value:.3g}" for value in row.values()))


if __name__ == "__main__":
    cli.run(main)
