"""Time and memory of attention functions against the length: measured, fitted, shown.

A cell is one attention at one length, dtype and pass, "forward" or "gradients".
"""

import dataclasses
import json
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

from experiments.benchmarks.timing import compile_all, take_turns
from experiments.provenance import write_json
from skyformer_jax.attention import NAMES, REGISTRY, kernelized_attention, layer_variables
from skyformer_jax.progress import say

PASSES = ("forward", "gradients")
DTYPES = ("float32", "bfloat16")
# Exponents are fitted to at least so many points at lengths from this on, where what does not
# depend on the length no longer counts.
_FIT_FROM = 4096
_FIT_POINTS = 3

Arrays = dict[str, jax.Array]
Attend = Callable[[jax.Array, jax.Array | None, jax.Array, Arrays, jax.Array], jax.Array]
Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells of a result have in common.

    Attributes:
      attentions: of ATTENTIONS.
      dtypes: of DTYPES, those of query, key and value.
      passes: of PASSES.
      heads: number of heads.
      head_dim: size of a head.
      rounds: turns that each cell takes.
      batch: sequences in a call; 0 means as many as have `tokens` tokens together.
      tokens: see batch.
      max_seconds: a cell that takes longer is timed once, and is not timed at greater lengths.
      max_temporaries: bytes; a cell that needs more is not run.
      seed: of inputs, arrays and what is drawn.
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


def _flash(
    query: jax.Array, key: jax.Array, value: jax.Array, arrays: Arrays, rng: jax.Array
) -> jax.Array:
    """Softmax attention by cuDNN, which holds no scores; for GPUs, in 16 bits."""
    del arrays, rng
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _kernelized_dense(
    query: jax.Array, key: jax.Array, value: jax.Array, arrays: Arrays, rng: jax.Array
) -> jax.Array:
    """Kernelized attention that holds all scores."""
    del arrays, rng
    return kernelized_attention(query, key, value, implementation="dense")


# What is measured beside the nine attentions.
EXTRAS: dict[str, Attend] = {"flash": _flash, "kernelized-dense": _kernelized_dense}
ATTENTIONS = (*NAMES, *EXTRAS)


def callable_of(name: str) -> Attend:
    """The attention of that name as a function of query, key, value, arrays and rng.

    Only what training draws anew in every step, the stream "landmarks", is drawn by the rng.
    """
    if name in EXTRAS:
        return EXTRAS[name]
    entry = REGISTRY[name]

    def attend(
        query: jax.Array,
        key: jax.Array | None,
        value: jax.Array,
        arrays: Arrays,
        rng: jax.Array,
    ) -> jax.Array:
        rng = rng if entry.stream == "landmarks" else None
        return entry.function(query, key, value, rng=rng, **arrays)

    return attend


def arrays_of(name: str, settings: Settings, length: int) -> tuple[Arrays, Arrays]:
    """What a layer keeps for an attention, as training gives it: the trained, and the fixed."""
    if name in EXTRAS:
        return {}, {}
    described = layer_variables(
        name, {}, num_heads=settings.heads, head_dim=settings.head_dim, kv_length=length
    )
    drawn_anew = REGISTRY[name].stream == "landmarks"
    trained, fixed = {}, {}
    for i, (argument, array) in enumerate(described.items()):
        if array.trained or not drawn_anew:
            key = jax.random.fold_in(jax.random.key(settings.seed), i)
            (trained if array.trained else fixed)[argument] = array.init(key, array.shape)
    return trained, fixed


def make_inputs(settings: Settings, length: int, dtype: str) -> tuple[jax.Array, ...]:
    """Normal query, key, value and weights of the output, [batch, length, heads, head_dim]."""
    batch = settings.batch or max(1, settings.tokens // length)
    shape = (batch, length, settings.heads, settings.head_dim)
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    return tuple(jax.random.normal(key, shape, dtype) for key in keys)


def make_program(
    name: str, kind: str, settings: Settings, inputs: tuple[jax.Array, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """A jitted pass of an attention, and its arguments.

    Args:
      name: of ATTENTIONS.
      kind: "forward", or "gradients": those of sum(out * weights) by query, key, value and the
        trained arrays, the forward pass that they need included.
      settings: for the arrays.
      inputs: of make_inputs.
    """
    query, key, value, weights = inputs
    if name in REGISTRY and REGISTRY[name].shared_query_key:
        key = None
    trained, fixed = arrays_of(name, settings, query.shape[1])
    rng = jax.random.key(settings.seed)
    attend = callable_of(name)

    def forward(
        query: jax.Array,
        key: jax.Array | None,
        value: jax.Array,
        trained: Arrays,
        fixed: Arrays,
        rng: jax.Array,
    ) -> jax.Array:
        return attend(query, key, value, {**trained, **fixed}, rng)

    def total(*arguments: Any) -> jax.Array:
        *others, weights = arguments
        return (forward(*others).astype(jnp.float32) * weights).sum()

    arguments = (query, key, value, trained, fixed, rng)
    if kind == "forward":
        return jax.jit(forward), arguments
    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))), (*arguments, weights)


def device_memory() -> int:
    """Bytes that temporaries may take: half of a CPU's memory, or all that the device gives."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _same(cell: Cell, other: Cell) -> bool:
    """Whether only the length differs."""
    return all(cell[field] == other[field] for field in ("attention", "dtype", "pass"))


def skip_reason(cell: Cell, shorter: Sequence[Cell], settings: Settings) -> str | None:
    """Why a compiled cell is not run, or None.

    Args:
      cell: with temporaries_bytes.
      shorter: the cells of smaller lengths, of any attention.
      settings: with the limits.
    """
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
    settings: Settings,
    length: int,
    shorter: Sequence[Cell],
    *,
    workers: int = 1,
    deadline: float = math.inf,
) -> list[Cell]:
    """All cells of one length, compiled and then timed by turns.

    Args:
      settings: what to measure.
      length: tokens of a sequence.
      shorter: the cells of smaller lengths.
      workers: programs compiled at the same time; compile seconds compare only where it is 1.
      deadline: time.monotonic() after which nothing more is begun.

    Returns:
      For each of the settings' attentions, dtypes and passes: attention, length, batch, dtype,
      pass, compile_seconds, temporaries_bytes, argument_bytes, output_bytes, seconds, a list with
      those of one call in each round, and median_seconds. One that is not run has skipped, the
      reason, in place of what it lacks.
    """
    start = time.perf_counter()
    cells, lowerings, calls = {}, {}, {}
    for dtype in settings.dtypes:
        inputs = make_inputs(settings, length, dtype)
        for kind in settings.passes:
            for name in settings.attentions:
                cell = {"attention": name, "length": length, "batch": len(inputs[0])}
                cells[name, dtype, kind] = cell | {"dtype": dtype, "pass": kind}
                function, arguments = make_program(name, kind, settings, inputs)
                lowerings[name, dtype, kind] = lambda f=function, a=arguments: f.lower(*a)
                calls[name, dtype, kind] = arguments
    programs, rows = compile_all(lowerings, f"n={length}", workers=workers, deadline=deadline)
    for which, row in rows.items():
        cells[which] |= row
        if which in programs and (reason := skip_reason(cells[which], shorter, settings)):
            cells[which]["skipped"] = reason
            del programs[which]
    turns = take_turns(
        {which: lambda p=program, a=calls[which]: p(*a) for which, program in programs.items()},
        settings.rounds,
        f"n={length}",
        max_seconds=settings.max_seconds,
        deadline=deadline,
    )
    for which, row in turns.items():
        cells[which] |= row
    say(f"n={length}: {len(turns)} of {len(cells)} timed, {time.perf_counter() - start:.0f} s")
    return list(cells.values())


def measure(
    settings: Settings, lengths: Sequence[int], path: Path, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Measures length by length into a JSON file, from where an interrupted run left it.

    Args:
      settings: what to measure.
      lengths: in rising order.
      path: of the file, written whole after each length. If it is there already, from the same
        settings and header, only lengths that it lacks are measured.
      header: what the file says first, with the commit.

    Returns:
      What the file holds: the header, settings, cells (see measure_length) and exponents.
    """
    result = {**header, "settings": dataclasses.asdict(settings)}
    result = json.loads(json.dumps(result)) | {"cells": [], "exponents": []}
    if path.exists():
        result["cells"] = _kept_cells(path, result)
        result["exponents"] = exponents(result["cells"])
    for length in lengths:
        if any(cell["length"] == length for cell in result["cells"]):
            continue
        shorter = [cell for cell in result["cells"] if cell["length"] < length]
        result["cells"] += measure_length(settings, length, shorter)
        result["cells"].sort(key=lambda cell: cell["length"])
        result["exponents"] = exponents(result["cells"])
        write_json(path, result)
    return result


def _kept_cells(path: Path, fresh: Mapping[str, Any]) -> list[Cell]:
    """The cells of an earlier result that a fresh one can go on from, and says whether it does."""
    try:
        old = json.loads(path.read_text())
        cells = old.pop("cells")
        old.pop("exponents")
    except (KeyError, ValueError):
        say(f"{path} is not a result of this script: measured anew")
        return []
    differing = [
        field
        for field in sorted({*old, *fresh} - {"cells", "exponents"})
        if old.get(field) != fresh.get(field)
    ]
    if not differing and fresh["commit"].endswith("-dirty"):
        say(f"{path} may be of other code, with uncommitted changes as now: measured anew")
        return []
    if differing:
        say(f"{path} has other {', '.join(differing)}: measured anew")
        return []
    say(f"{path} goes on: has lengths {sorted({cell['length'] for cell in cells})}")
    return cells


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Least-squares slope of log value against log length, from 4096 on.

    Returns:
      The exponent, or None with fewer than 3 points or where a value is not positive.
    """
    points = [(n, v) for n, v in zip(lengths, values, strict=True) if n >= _FIT_FROM]
    if len(points) < _FIT_POINTS or min(v for _, v in points) <= 0:
        return None
    return float(np.polyfit(*np.log(np.array(points, float)).T, 1)[0])


def exponents(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """How time and temporaries of one sequence grow, for each attention, dtype and pass."""
    rows = []
    for first in {(c["attention"], c["dtype"], c["pass"]): c for c in cells}.values():
        line = [cell for cell in cells if _same(cell, first)]
        row = {field: first[field] for field in ("attention", "dtype", "pass")}
        for what, field in (("time", "median_seconds"), ("temporaries", "temporaries_bytes")):
            found = [cell for cell in line if field in cell]
            row[what] = fit_exponent(
                [cell["length"] for cell in found],
                [cell[field] / cell["batch"] for cell in found],
            )
        rows.append(row)
    return rows


def tables(cells: Sequence[Cell]) -> str:
    """Milliseconds and MiB of temporaries of a call, a row an attention, a column a length."""
    lengths = sorted({cell["length"] for cell in cells})
    names = list(dict.fromkeys(cell["attention"] for cell in cells))
    lines = []
    for dtype, kind in dict.fromkeys((cell["dtype"], cell["pass"]) for cell in cells):
        at = {
            (cell["attention"], cell["length"]): cell
            for cell in cells
            if (cell["dtype"], cell["pass"]) == (dtype, kind)
        }
        for unit, field, factor in (
            ("ms", "median_seconds", 1e3),
            ("MiB", "temporaries_bytes", 2**-20),
        ):
            head = "".join(f"{length:12,}" for length in lengths)
            lines.append(f"{f'{kind}, {dtype}, {unit}':32}{head}")
            for name in names:
                row = (at.get((name, length), {}).get(field) for length in lengths)
                texts = ("-" if x is None else f"{factor * x:,.2f}" for x in row)
                lines.append(f"{name:32}" + "".join(f"{text:>12}" for text in texts))
    skipped: dict[str, list[str]] = {}
    for cell in cells:
        if "skipped" in cell:
            which = f"{cell['attention']}, {cell['pass']}, {cell['dtype']}, {cell['length']:,}"
            skipped.setdefault(cell["skipped"], []).append(which)
    for reason, which in skipped.items():
        more = f" and {len(which) - 1} more" if len(which) > 1 else ""
        lines.append(f"{which[0]}{more}: {reason}")
    return "\n".join(lines)


# Of Okabe and Ito, who chose them to be told apart by everyone, and two greys; each with a marker.
STYLES = {
    "skyformer": ("#D55E00", "o"),
    "kernelized": ("#000000", "s"),
    "softmax": ("#0072B2", "^"),
    "nystromformer": ("#E69F00", "D"),
    "linformer": ("#56B4E9", "v"),
    "informer": ("#009E73", "P"),
    "performer": ("#CC79A7", "X"),
    "reformer": ("#B8A800", "<"),
    "bigbird": ("#7F7F7F", ">"),
}
_OTHER_STYLES = (("#5B2A86", "*"), ("#8C510A", "h"))


def draw(axes: np.ndarray, cells: Sequence[Cell], rows: Sequence[dict[str, Any]]) -> None:
    """Draws time and temporaries of a call against the length, with exponents in the legends.

    An attention is drawn in the first dtype that it was measured in.

    Args:
      axes: [passes, 2], of matplotlib.
      cells: of measure_length.
      rows: of exponents(cells).
    """
    others = [name for name in dict.fromkeys(c["attention"] for c in cells) if name not in STYLES]
    styles = STYLES | dict(zip(others, _OTHER_STYLES, strict=False))
    kinds = list(dict.fromkeys(cell["pass"] for cell in cells))
    for of_pass, kind in zip(axes, kinds, strict=True):
        for axis, what, field, factor in (
            (of_pass[0], "time", "median_seconds", 1e3),
            (of_pass[1], "temporaries", "temporaries_bytes", 2**-20),
        ):
            ends = {}
            for name in styles:
                points = [
                    cell
                    for cell in cells
                    if (cell["attention"], cell["pass"]) == (name, kind) and cell.get(field)
                ]
                if not points:
                    continue
                dtype = points[0]["dtype"]
                points = [cell for cell in points if cell["dtype"] == dtype]
                slope = next(row for row in rows if _same(row, points[0]))[what]
                label = name if dtype == cells[0]["dtype"] else f"{name} ({dtype})"
                color, marker = styles[name]
                ours = name == "skyformer"
                (line,) = axis.plot(
                    [cell["length"] for cell in points],
                    [factor * cell[field] for cell in points],
                    color=color,
                    marker=marker,
                    markersize=7 if ours else 5,
                    linewidth=3 if ours else 1.3,
                    zorder=3 if ours else 2,
                    label=label if slope is None else f"{label}  $n^{{{slope:.2f}}}$",
                )
                ends[line] = (-points[-1]["length"], points[-1][field])
            axis.set(
                title=f"{kind}, {'milliseconds' if what == 'time' else 'MiB of temporaries'}",
                yscale="log",
                xlabel="tokens of a sequence",
            )
            axis.set_xscale("log")
            lengths = sorted({cell["length"] for cell in cells})
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.set_xticks([], minor=True)
            axis.grid(which="major", alpha=0.3)
            lines = sorted(ends, key=ends.get, reverse=True)
            axis.legend(handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The figure of a result of measure: a row a pass, time on the left, memory on the right."""
    settings, cells = result["settings"], result["cells"]
    num_passes = len(settings["passes"])
    figure, axes = plt.subplots(
        num_passes, 2, figsize=(14, 4.5 * num_passes), layout="tight", squeeze=False
    )
    draw(axes, cells, result["exponents"])
    figure.suptitle(
        f"{result['device']}, {result['cores']} cores, batch {settings['batch']}, "
        f"{settings['heads']} heads of {settings['head_dim']}, {cells[0]['dtype']}"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
