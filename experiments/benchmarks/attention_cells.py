"""Measures, fits and plots time and memory of attention functions against the length.

A cell is one attention at one length, dtype and pass, "forward" or "gradients".
"""

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.benchmarks.timing import as_text, measure_calls
from experiments.palette import line_style
from experiments.records import Row
from skyformer_jax.attention import (
    NAMES,
    REGISTRY,
    kernelized_attention,
    layer_variables,
    skyformer_attention,
    softmax_attention,
)
from skyformer_jax.progress import say

PASSES = ("forward", "gradients")
DTYPES = ("float32", "bfloat16")
PAPER_HEADS = {"heads": 2, "head_dim": 32}
# Exponents are fitted to at least _FIT_POINTS points at lengths from _FIT_FROM on, where costs that
# do not depend on the length no longer matter.
_FIT_FROM = 4096
_FIT_POINTS = 3
# What is plotted of a cell: the name of its exponent, unit, field and factor.
_SHOWN = (
    ("time", "ms", "median_seconds", 1e3),
    ("temporaries", "MiB", "temporaries_bytes", 2**-20),
)

Arrays = dict[str, jax.Array]
Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all cells of a result share.

    Attributes:
      attentions: some of ATTENTIONS.
      dtypes: some of DTYPES, the dtypes of query, key and value.
      passes: some of PASSES.
      heads: number of heads.
      head_dim: size of each head.
      rounds: turns that each cell takes.
      batch: sequences in a call; 0 means as many as have `tokens` tokens together, at least one.
      tokens: tokens in a call if batch is 0.
      max_seconds: a cell that takes longer is timed once, and is not timed at greater lengths.
      max_temporaries: bytes; a cell that needs more is not run.
      seed: seed of the inputs, variables and random draws.
    """

    attentions: tuple[str, ...]
    dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    heads: int
    head_dim: int
    rounds: int
    batch: int = 0
    tokens: int = 0
    max_seconds: float = math.inf
    max_temporaries: float = math.inf
    seed: int = 0


# Functions measured beside the nine attentions; after a dash, an attention's implementation.
EXTRAS: dict[str, Callable[..., jax.Array]] = {
    # cuDNN's softmax attention, which stores no scores; for GPUs, in 16 bits.
    "flash": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    # Implementations that store all scores, or compute them in tiles without a kernel.
    "softmax-dense": functools.partial(softmax_attention, implementation="dense"),
    "softmax-chunked": functools.partial(softmax_attention, implementation="chunked"),
    "kernelized-dense": functools.partial(kernelized_attention, implementation="dense"),
    "kernelized-chunked": functools.partial(kernelized_attention, implementation="chunked"),
    "skyformer-chunked": functools.partial(skyformer_attention, implementation="chunked"),
}
ATTENTIONS = (*NAMES, *EXTRAS)


def _variables_of(name: str, settings: Settings, length: int) -> tuple[Arrays, Arrays]:
    """Returns the trained and the fixed variables that a layer keeps for an attention.

    Variables of the stream "landmarks", which training draws anew in every step, are left out.
    """
    trained, fixed = {}, {}
    if name in REGISTRY:
        specs = layer_variables(
            name, {}, num_heads=settings.heads, head_dim=settings.head_dim, kv_length=length
        )
        for i, (argument, spec) in enumerate(specs.items()):
            if spec.trained or REGISTRY[name].stream != "landmarks":
                key = jax.random.fold_in(jax.random.key(settings.seed), i)
                (trained if spec.trained else fixed)[argument] = spec.init(key, spec.shape)
    return trained, fixed


def make_inputs(settings: Settings, length: int, dtype: str) -> tuple[jax.Array, ...]:
    """Draws normal query, key, value and output weights, [batch, length, heads, head_dim]."""
    batch = settings.batch or max(1, settings.tokens // length)
    shape = (batch, length, settings.heads, settings.head_dim)
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    return tuple(jax.random.normal(key, shape, dtype) for key in keys)


def make_call(
    name: str, kind: str, settings: Settings, inputs: tuple[jax.Array, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a pass of an attention as a function to be jitted, and its arguments.

    Args:
      name: one of ATTENTIONS.
      kind: "forward", or "gradients", which are those of sum(out * weights) with respect to query,
        key, value and the trained variables, including the forward pass that they need.
      settings: the settings of the variables.
      inputs: the arrays from make_inputs.
    """
    query, key, value, weights = inputs
    if name in REGISTRY and REGISTRY[name].shared_query_key:
        key = None

    def forward(
        arrays: tuple[jax.Array | None, ...], trained: Arrays, fixed: Arrays, rng: jax.Array
    ) -> jax.Array:
        if name in EXTRAS:
            return EXTRAS[name](*arrays)
        drawn_anew = REGISTRY[name].stream == "landmarks"
        return REGISTRY[name].function(*arrays, rng=rng if drawn_anew else None, **trained, **fixed)

    def total(*arguments: Any) -> jax.Array:
        *others, weights = arguments
        return (forward(*others).astype(jnp.float32) * weights).sum()

    variables = _variables_of(name, settings, query.shape[1])
    arguments = ((query, key, value), *variables, jax.random.key(settings.seed))
    if kind == "forward":
        return forward, arguments
    return jax.grad(total, argnums=(0, 1)), (*arguments, weights)


def device_memory() -> int:
    """Returns the bytes for temporaries: the device's limit, or half of a CPU's memory."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _same(cell: Cell, other: Cell) -> bool:
    """Returns whether two cells have the same attention, dtype and pass."""
    return all(cell[field] == other[field] for field in ("attention", "dtype", "pass"))


def _skip_reason(cell: Cell, shorter: Sequence[Cell], settings: Settings) -> str | None:
    """Returns why a compiled cell is not run, given the cells of smaller lengths; else None."""
    if cell["temporaries_bytes"] > settings.max_temporaries:
        return (
            f"needs {cell['temporaries_bytes'] / 2**30:.1f} GiB of temporaries, more than "
            f"{settings.max_temporaries / 2**30:.1f}"
        )
    for other in shorter:
        if _same(cell, other) and other.get("median_seconds", 0) > settings.max_seconds:
            return (
                f"length {other['length']} took {other['median_seconds']:.1f} s, more than "
                f"{settings.max_seconds:g}"
            )
    return None


def measure_length(
    settings: Settings, length: int, shorter: Sequence[Cell], **options: Any
) -> list[Cell]:
    """Compiles all cells of one length, then times them in turns.

    Args:
      settings: what to measure.
      length: tokens of a sequence.
      shorter: the cells of smaller lengths.
      **options: workers and deadline of timing.measure.

    Returns:
      For each of the settings' attentions, dtypes and passes: attention, length, batch, dtype,
      pass, and the fields of timing.measure.
    """
    start = time.perf_counter()
    cells, calls = {}, {}
    for dtype in settings.dtypes:
        inputs = make_inputs(settings, length, dtype)
        for kind, name in itertools.product(settings.passes, settings.attentions):
            cell = {"attention": name, "length": length, "batch": len(inputs[0])}
            cells[name, dtype, kind] = cell | {"dtype": dtype, "pass": kind}
            calls[name, dtype, kind] = make_call(name, kind, settings, inputs)
    rows = measure_calls(
        calls,
        settings.rounds,
        f"n={length}",
        reason_to_skip=lambda which, row: _skip_reason(cells[which] | row, shorter, settings),
        max_seconds=settings.max_seconds,
        **options,
    )
    timed = sum("seconds" in row for row in rows.values())
    say(f"n={length}: {timed} of {len(rows)} timed, {time.perf_counter() - start:.0f} s")
    return [cells[which] | row for which, row in rows.items()]


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Fits the slope of log value against log length by least squares, from 4096 tokens on.

    Returns:
      The exponent, or None if there are fewer than 3 points or a value is not positive.
    """
    points = [(n, v) for n, v in zip(lengths, values, strict=True) if n >= _FIT_FROM]
    if len(points) < _FIT_POINTS or min(v for _, v in points) <= 0:
        return None
    return float(np.polyfit(*np.log(np.array(points, float)).T, 1)[0])


def exponents(cells: Sequence[Cell]) -> list[Row]:
    """Fits exponents of time and temporaries per sequence, by attention, dtype and pass."""
    rows = []
    for first in {(c["attention"], c["dtype"], c["pass"]): c for c in cells}.values():
        row = {field: first[field] for field in ("attention", "dtype", "pass")}
        for what, _, field, _ in _SHOWN:
            found = [cell for cell in cells if _same(cell, first) and field in cell]
            row[what] = fit_exponent(
                [cell["length"] for cell in found],
                [cell[field] / cell["batch"] for cell in found],
            )
        rows.append(row)
    return rows


def tables(cells: Sequence[Cell]) -> str:
    """Formats time and temporaries of every cell, one per line."""
    return as_text(cells, "attention", "dtype", "pass", "length")


def _draw(
    axis: plt.Axes,
    cells: Sequence[Cell],
    slopes: Sequence[Row],
    shown: tuple[str, str, str, float],
) -> None:
    """Draws a panel of one quantity of one pass against the length, a line per attention."""
    what, unit, field, factor = shown
    ends = {}
    for name in dict.fromkeys(cell["attention"] for cell in cells):
        points = [cell for cell in cells if cell["attention"] == name and cell.get(field)]
        if not points:
            continue
        points = [cell for cell in points if _same(cell, points[0])]
        slope = next(row for row in slopes if _same(row, points[0]))[what]
        dtype = points[0]["dtype"]
        label = name if dtype == cells[0]["dtype"] else f"{name} ({dtype})"
        (line,) = axis.plot(
            [cell["length"] for cell in points],
            [factor * cell[field] for cell in points],
            label=label if slope is None else f"{label}  $n^{{{slope:.2f}}}$",
            **line_style(name),
        )
        ends[line] = (-points[-1]["length"], points[-1][field])
    lengths = sorted({cell["length"] for cell in cells})
    axis.set(title=f"{cells[0]['pass']}: {what}, {unit}", xscale="log", yscale="log")
    axis.set_xticks(lengths[::2], [f"{length:,}" for length in lengths[::2]])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens of a sequence")
    axis.grid(which="major", alpha=0.3)
    lines = sorted(ends, key=ends.get, reverse=True)
    axis.legend(handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def plot(result: Mapping[str, Any], title: str, path: Path) -> None:
    """Draws time and temporaries of a call against the length, with exponents in the legends.

    Of several passes the last one is drawn: the gradients, which are what training costs. Each
    attention is drawn in the first dtype that it was measured in.

    Args:
      result: settings, cells (of measure_length) and exponents.
      title: what all cells have in common.
      path: the PNG file to write.
    """
    cells = [cell for cell in result["cells"] if cell["pass"] == result["settings"]["passes"][-1]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.9), layout="tight")
    for axis, shown in zip(axes, _SHOWN, strict=True):
        _draw(axis, cells, result["exponents"], shown)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
