"""Compares the times of the Gaussian passes with the limits of the device."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import attention_cells
from experiments.benchmarks.timing import measure_calls
from experiments.records import Row
from skyformer_jax.attention.gaussian import gaussian_attention

_HEADS, _HEAD_DIM = attention_cells.PAPER_HEADS.values()
_LANDMARKS = 128  # as in the paper
_ROUNDS = 3
_WORKERS = 2  # programs compiled at a time

# Dense operations and bytes per second by jax's device_kind, from NVIDIA's data sheets of the H100
# (SXM) and the H200. Their figures for tensor cores are for sparse matrices, twice these.
_HOPPER = {"float32": 66.9e12, "tf32": 494e12, "bfloat16": 989e12}
PEAKS = {
    "NVIDIA H100 80GB HBM3": {**_HOPPER, "bytes": 3.35e12},
    "NVIDIA H200": {**_HOPPER, "bytes": 4.8e12},
}


def measure_peaks(small: bool, deadline: float) -> dict[str, float]:
    """Measures operations per second of large matrix products, and bytes per second of x + 1.

    "float32" is the rate at the highest precision, "tf32" that of float32 at a GPU's default.
    """
    size, length = (512, 2**22) if small else (8192, 2**28)
    key = jax.random.key(0)
    matrix = jax.random.normal(key, (size, size))
    calls = {
        "float32": (lambda x: jnp.dot(x, x, precision="highest"), (matrix,)),
        "bfloat16": (lambda x: jnp.dot(x, x), (matrix.astype(jnp.bfloat16),)),
        "bytes": (lambda x: x + 1, (jax.random.normal(key, (length,)),)),
    }
    if jax.default_backend() == "gpu":
        calls["tf32"] = (lambda x: jnp.dot(x, x), (matrix,))
    work = dict.fromkeys(calls, 2 * size**3) | {"bytes": 2 * 4 * length}
    rows = measure_calls(calls, _ROUNDS, "peaks", workers=_WORKERS, deadline=deadline)
    return {
        name: work[name] / row["median_seconds"]
        for name, row in rows.items()
        if "median_seconds" in row
    }


def count_work(kind: str, pairs: int, rows: int) -> dict[str, int]:
    """Counts the least work of a Gaussian pass in float32.

    The forward pass multiplies queries by keys and scores by values: 2 products of 2 * head_dim
    operations for each pair. With gradients, and scores recomputed rather than kept, it is these 2,
    the first one again, and 4 for the gradients of values, scores, queries and keys. Each time that
    scores are computed adds one exponential per pair.

    Args:
      kind: "forward" or "gradients".
      pairs: number of pairs of a query and a key, over batch and heads.
      rows: number of queries and keys together, over batch and heads, each of size head_dim.

    Returns:
      operations, exponentials, and bytes: query, key, value (and the output's gradient) read
      once, output (and three gradients) written once.
    """
    products, exponentials, arrays = {"forward": (2, 1, 2), "gradients": (7, 2, 4)}[kind]
    return {
        "operations": products * 2 * _HEAD_DIM * pairs,
        "exponentials": exponentials * pairs,
        "bytes": arrays * 4 * _HEAD_DIM * rows,
    }


def measure_roofline(
    tokens: int,
    lengths: tuple[int, ...],
    implementations: tuple[str, ...],
    peaks: Mapping[str, float],
    deadline: float,
) -> list[Row]:
    """Returns a row for each Gaussian pass, length, kind and implementation.

    A call has tokens // length sequences. A row has the fields of count_work and timing.measure,
    and shares: for each of the units "float32" and "tf32" that has a peak, the least time that the
    device needs over the median time.
    """

    def make_calls(implementation: str) -> dict[str, Callable[..., Any]]:
        def forward(query: jax.Array, key: jax.Array, value: jax.Array, _: jax.Array) -> jax.Array:
            options = {"scale": _HEAD_DIM**-0.5, "implementation": implementation}
            return gaussian_attention(query, key, value, **options)

        def gradients(*arrays: jax.Array) -> Any:
            *inputs, weights = arrays
            out, pull = jax.vjp(lambda *x: forward(*x, weights), *inputs)
            return out, pull(weights)

        return {"forward": forward, "gradients": gradients}

    calls = {}
    for length, which, name in itertools.product(lengths, ("queries", "keys"), implementations):
        num_queries, num_keys = (length, _LANDMARKS)[:: 1 if which == "queries" else -1]
        inputs = tuple(
            jax.random.normal(jax.random.key(i), (tokens // length, num, _HEADS, _HEAD_DIM))
            for i, num in enumerate((num_queries, num_keys, num_keys, num_queries))
        )
        for kind, function in make_calls(name).items():
            calls[which, kind, length, name] = (function, inputs)
    measured = measure_calls(calls, _ROUNDS, "Gaussian passes", workers=_WORKERS, deadline=deadline)
    rows = []
    for (which, kind, length, name), row in measured.items():
        of_all = tokens // length * _HEADS
        work = count_work(kind, of_all * length * _LANDMARKS, of_all * (length + _LANDMARKS))
        size = {"rows": which, "pass": kind, "length": length, "batch": tokens // length}
        size["implementation"] = name
        rows.append(size | work | row)
        if "median_seconds" in row:
            rows[-1]["shares"] = {
                unit: max(work["operations"] / peaks[unit], work["bytes"] / peaks["bytes"])
                / row["median_seconds"]
                for unit in ("float32", "tf32")
                if {unit, "bytes"} <= peaks.keys()
            }
    return rows
