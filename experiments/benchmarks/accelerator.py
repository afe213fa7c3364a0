"""What an accelerator makes of the attentions and of training, by one command in a few minutes.

    python -m experiments.benchmarks.accelerator

1. How near Skyformer's two Gaussian passes, queries with landmarks and landmarks with keys, come
   to what the device can do: the share of the measured time that arithmetic at the peak rate, or
   reading every input and writing every output once, would take, whichever is more.
2. Time and temporaries of all attentions, and of cuDNN's, as speed.py has them, at a fixed number
   of tokens in a call, which fills the device at every length: what is linear in the length takes
   the same time at each, what is quadratic grows with it.
3. Steps per second of training in the paper's settings, and what 50,000 would take beside the
   hours of the paper's table 2.

Programs compile several at a time, so compile seconds do not compare. When the minutes are over,
what is left is recorded as not reached. Writes JSON with commit, versions and hardware as it goes
on, and a plot of the second part beside it. --small is tiny in everything, to try the script
without an accelerator.
"""

import dataclasses
import importlib
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks import attention_cells, common_flags
from experiments.benchmarks.timing import as_text, measure_calls, measure_steps
from experiments.paper import published
from experiments.records import Row, provenance, write_json
from skyformer_jax import attention, cli
from skyformer_jax.attention.gaussian import gaussian_attention
from skyformer_jax.errors import UserError

_MINUTES = flags.DEFINE_float("minutes", 8, "Time for everything.", lower_bound=0)
_SMALL = common_flags.small()
_OUT = common_flags.out("results/accelerator.json")

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
_FIRST = ("skyformer", "softmax", "kernelized")
# The share of the minutes after which the training steps begin.
_STEPS_FROM = 0.6
_HEADS, _HEAD_DIM = attention_cells.PAPER_HEADS.values()
_LANDMARKS = 128  # of the paper
_ROUNDS = 3
_WORKERS = os.cpu_count() or 1

# Dense operations and bytes a second, by jax's device_kind: NVIDIA's data sheets of the H100
# (SXM) and the H200, whose figures for tensor cores are for sparse matrices, twice these.
_HOPPER = {"float32": 66.9e12, "tf32": 494e12, "bfloat16": 989e12}
PEAKS = {
    "NVIDIA H100 80GB HBM3": {**_HOPPER, "bytes": 3.35e12},
    "NVIDIA H200": {**_HOPPER, "bytes": 4.8e12},
}


def measure_peaks(deadline: float) -> dict[str, float]:
    """Operations a second of large square products, and bytes a second of a large sum.

    "float32" is at the highest precision, "tf32" as a GPU multiplies float32 otherwise.
    """
    size, length = (512, 2**22) if _SMALL.value else (8192, 2**28)
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
    """The least that a Gaussian pass has to do, in float32.

    Forward, it multiplies queries by keys and scores by values: 2 products of 2 * head_dim
    operations for each pair. With gradients, where scores are computed again rather than kept,
    it is these 2, the first again, and 4 for the gradients of values, scores, queries and keys.
    An exponential for each pair and time that scores are computed comes on top.

    Args:
      kind: "forward" or "gradients".
      pairs: of a query and a key, over batch and heads.
      rows: queries and keys together, over batch and heads, of head_dim each.

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
    tokens: int, lengths: tuple[int, ...], peaks: Mapping[str, float], deadline: float
) -> list[Row]:
    """A row for each Gaussian pass, length and kind, with tokens // length sequences in a call.

    It has the count_work, the fields of timing.measure, and shares: for the units "float32" and
    "tf32", if they have a peak, the least time that the device needs over the median.
    """

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, _: jax.Array) -> jax.Array:
        return gaussian_attention(query, key, value, scale=_HEAD_DIM**-0.5)

    def gradients(query: jax.Array, key: jax.Array, value: jax.Array, weights: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *x: forward(*x, weights), query, key, value)
        return out, pull(weights)

    calls = {}
    for length, which in itertools.product(lengths, ("queries", "keys")):
        num_queries, num_keys = (length, _LANDMARKS)[:: 1 if which == "queries" else -1]
        inputs = tuple(
            jax.random.normal(jax.random.key(i), (tokens // length, num, _HEADS, _HEAD_DIM))
            for i, num in enumerate((num_queries, num_keys, num_keys, num_queries))
        )
        calls[which, "forward", length] = (forward, inputs)
        calls[which, "gradients", length] = (gradients, inputs)
    measured = measure_calls(calls, _ROUNDS, "Gaussian passes", workers=_WORKERS, deadline=deadline)
    rows = []
    for (which, kind, length), row in measured.items():
        of_all = tokens // length * _HEADS
        work = count_work(kind, of_all * length * _LANDMARKS, of_all * (length + _LANDMARKS))
        size = {"rows": which, "pass": kind, "length": length, "batch": tokens // length}
        rows.append(size | work | row)
        if "median_seconds" in row:
            rows[-1]["shares"] = {
                unit: max(work["operations"] / peaks[unit], work["bytes"] / peaks["bytes"])
                / row["median_seconds"]
                for unit in ("float32", "tf32")
                if {unit, "bytes"} <= peaks.keys()
            }
    return rows


def step_rows(names: tuple[str, ...], tasks: tuple[str, ...], deadline: float) -> list[Row]:
    """Rows of measure_steps for some attentions and tasks, with the paper's hours."""
    variant = "small" if _SMALL.value else ""
    configs = {
        (task, name): importlib.import_module(f"configs.{task}").get_config(f"{name},{variant}")
        for task, name in itertools.product(tasks, names)
    }
    what = f"steps of {', '.join(tasks)}"
    measured = measure_steps(configs, _ROUNDS, what, workers=_WORKERS, deadline=deadline)
    rows = []
    for (task, name), row in measured.items():
        rows.append({"task": task, "attention": name, **row})
        if "median_seconds_per_step" in row and not _SMALL.value:
            seconds = published.STEPS * row["median_seconds_per_step"]
            rows[-1]["hours_of_50000_steps"] = seconds / 3600
            rows[-1]["paper_v100_hours"] = published.HOURS[name][task]
    return rows


def main() -> None:
    """Measures one section after the other, writing each; prints tables and plots at the end."""
    start = time.monotonic()
    if jax.default_backend() == "cpu" and not _SMALL.value:
        raise UserError("jax finds no accelerator here; --small tries the script on a CPU")
    deadline = start + 60 * _MINUTES.value
    path, small = Path(_OUT.value), _SMALL.value
    settings = attention_cells.Settings(
        attentions=(*(_FIRST if small else attention.NAMES), "kernelized-dense", "flash"),
        dtypes=attention_cells.DTYPES,
        passes=attention_cells.PASSES,
        tokens=512 if small else 131_072,
        **attention_cells.PAPER_HEADS,
        rounds=_ROUNDS,
        max_seconds=2,
        max_temporaries=attention_cells.device_memory(),
    )
    lengths = (128, 256) if small else (1024, 4096, 16_384, 65_536, 131_072)
    data_sheet_peaks = PEAKS.get(jax.devices()[0].device_kind)
    peaks = measure_peaks(deadline)
    cells: list[Row] = []
    result: dict[str, Any] = {
        "what": "Gaussian passes against the device's peaks; attention functions at a fixed number "
        "of tokens in a call; training steps of the paper's settings on random tokens",
        **provenance(jax.device_count()),
        "seed": 0,
        "minutes": _MINUTES.value,
        "small": small,
        "data_sheet_peaks": data_sheet_peaks,
        "measured_peaks": peaks,
        "gaussian_passes": measure_roofline(
            settings.tokens,
            lengths[:1] if small else (lengths[1], lengths[-1]),
            data_sheet_peaks or peaks,
            deadline,
        ),
        "attention": {"settings": dataclasses.asdict(settings), "cells": cells, "exponents": []},
        "steps": [],
    }
    write_json(path, result)
    for length in lengths:
        until = start + _STEPS_FROM * 60 * _MINUTES.value
        cells += attention_cells.measure_length(
            settings, length, tuple(cells), workers=_WORKERS, deadline=until
        )
        result["attention"]["exponents"] = attention_cells.exponents(cells)
        write_json(path, result)

    others = tuple(name for name in attention.NAMES if name not in _FIRST)
    groups = [(_FIRST, TASKS)] + [(others, (task,)) for task in TASKS if not small]
    for names, tasks in groups:
        result["steps"] += step_rows(names, tasks, deadline)
        write_json(path, result)
    print(as_text(result["gaussian_passes"], "rows", "pass", "length"))
    print(attention_cells.tables(cells))
    print(as_text(result["steps"], "task", "attention"))
    call = f"{settings.tokens:,} tokens in a call, {_HEADS} heads of {_HEAD_DIM}"
    title = f"{result['device']}, {call}"
    attention_cells.plot(result["attention"], title, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
