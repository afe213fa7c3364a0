"""What an accelerator makes of the attentions and of training, by one command in a few minutes.

    python -m experiments.benchmarks.accelerator

1. How near Skyformer's two Gaussian passes, queries with landmarks and landmarks with keys, come
   to what the device can do: the share of the measured time that arithmetic at the peak rate, or
   reading every input and writing every output once, would take, whichever is more.
2. Time and temporaries of all attentions, and of cuDNN's, as experiments/speed.py has them, at a
   fixed number of tokens in a call, which fills the device at every length: what is linear in the
   length takes the same time at each, what is quadratic grows with it.
3. Steps per second of training in the paper's settings, and what 50,000 would take beside the
   hours of the paper's table 2.

Programs compile several at a time, so compile seconds do not compare. When the minutes are over,
what is left is recorded as not reached. Writes JSON with commit, versions and hardware as it goes
on, and a plot beside it. --small is tiny in everything, to try the script without an accelerator.
"""

import dataclasses
import importlib
import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from absl import flags

from experiments.benchmarks import attention_cells
from experiments.benchmarks.timing import compile_all, measure_steps, take_turns
from experiments.provenance import provenance, write_json
from skyformer_jax import attention, cli
from skyformer_jax.attention.gaussian import gaussian_attention
from skyformer_jax.errors import UserError

_MINUTES = flags.DEFINE_float("minutes", 8, "Time for everything.", lower_bound=0)
_SMALL = flags.DEFINE_bool("small", False, "Tiny, and on any device.")
_OUT = flags.DEFINE_string("out", "results/accelerator.json", "JSON to write; the plot has .png.")

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
_FIRST = ("skyformer", "softmax", "kernelized")
# The share of the minutes after which the training steps begin.
_STEPS_FROM = 0.6
_HEADS, _HEAD_DIM, _LANDMARKS = 2, 32, 128  # of the paper
_ROUNDS = 3

# Dense operations and bytes a second, by jax's device_kind: NVIDIA's data sheets of the H100
# (SXM) and the H200, whose figures for tensor cores are for sparse matrices, twice these.
PEAKS = {
    "NVIDIA H100 80GB HBM3": {
        "float32": 66.9e12,
        "tf32": 494e12,
        "bfloat16": 989e12,
        "bytes": 3.35e12,
    },
    "NVIDIA H200": {"float32": 66.9e12, "tf32": 494e12, "bfloat16": 989e12, "bytes": 4.8e12},
}

# Hours of 50,000 steps on one V100 (Chen et al., 2021, table 2).
_PAPER_TASKS = ("text", "listops", "retrieval", "pathfinder", "image")
PAPER_HOURS = {
    name: dict(zip(_PAPER_TASKS, hours, strict=True))
    for name, hours in {
        "softmax": (4.30, 2.24, 8.33, 2.57, 4.22),
        "kernelized": (3.91, 1.99, 7.46, 2.42, 4.05),
        "nystromformer": (0.71, 0.71, 1.29, 1.49, 2.70),
        "linformer": (0.65, 0.60, 1.13, 1.09, 2.19),
        "informer": (1.60, 1.19, 2.91, 2.39, 3.90),
        "performer": (0.77, 0.73, 1.41, 1.40, 2.55),
        "reformer": (0.94, 0.85, 1.73, 1.70, 3.08),
        "bigbird": (2.00, 1.88, 3.81, 3.39, 6.53),
        "skyformer": (1.02, 1.29, 1.86, 2.03, 3.40),
    }.items()
}


def measured_peaks(deadline: float) -> dict[str, float]:
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
    rows = _compile_and_time(calls, "peaks", deadline)
    return {
        name: work[name] / row["median_seconds"]
        for name, row in rows.items()
        if "median_seconds" in row
    }


def _compile_and_time(
    calls: Mapping[Any, tuple[Callable[..., Any], tuple[Any, ...]]], what: str, deadline: float
) -> dict[Any, dict[str, Any]]:
    """Rows of compile_all and take_turns together, for functions with their arguments."""
    programs, rows = compile_all(
        {name: lambda f=f, x=x: jax.jit(f).lower(*x) for name, (f, x) in calls.items()},
        what,
        workers=os.cpu_count() or 1,
        deadline=deadline,
    )
    turns = take_turns(
        {name: lambda p=p, x=calls[name][1]: p(*x) for name, p in programs.items()},
        _ROUNDS,
        what,
        deadline=deadline,
    )
    return {name: row | turns.get(name, {}) for name, row in rows.items()}


def count_work(kind: str, pairs: int, rows: int, head_dim: int) -> dict[str, int]:
    """The least that a Gaussian pass has to do, in float32.

    Forward, it multiplies queries by keys and scores by values: 2 products of 2 * head_dim
    operations for each pair. With gradients, where scores are computed again rather than kept,
    it is these 2, the first again, and 4 for the gradients of values, scores, queries and keys.
    An exponential for each pair and time that scores are computed comes on top.

    Args:
      kind: "forward" or "gradients".
      pairs: of a query and a key, over batch and heads.
      rows: queries and keys together, over batch and heads.
      head_dim: size of a row.

    Returns:
      operations, exponentials, and bytes: query, key, value (and the output's gradient) read
      once, output (and three gradients) written once.
    """
    products, exponentials, arrays = {"forward": (2, 1, 2), "gradients": (7, 2, 4)}[kind]
    return {
        "operations": products * 2 * head_dim * pairs,
        "exponentials": exponentials * pairs,
        "bytes": arrays * 4 * head_dim * rows,
    }


def measure_roofline(
    tokens: int, lengths: tuple[int, ...], peaks: Mapping[str, float], deadline: float
) -> list[dict[str, Any]]:
    """A row for each Gaussian pass, length and kind.

    Args:
      tokens: in a call.
      lengths: of a sequence; there are tokens // length of them.
      peaks: operations a second by unit, and bytes a second.
      deadline: time.monotonic() after which nothing more is begun.

    Returns:
      Rows of the pass, the count_work, median_seconds, and shares: for the units "float32" and
      "tf32", if they have a peak, the least time that the device needs over the median.
    """
    scale = _HEAD_DIM**-0.5

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, _: jax.Array) -> jax.Array:
        return gaussian_attention(query, key, value, scale=scale)

    def gradients(query: jax.Array, key: jax.Array, value: jax.Array, weights: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *x: forward(*x, weights), query, key, value)
        return out, pull(weights)

    calls, rows = {}, {}
    for length, which in itertools.product(lengths, ("queries", "keys")):
        batch = tokens // length
        num_queries, num_keys = (length, _LANDMARKS)[:: 1 if which == "queries" else -1]
        inputs = tuple(
            jax.random.normal(jax.random.key(i), (batch, num, _HEADS, _HEAD_DIM))
            for i, num in enumerate((num_queries, num_keys, num_keys, num_queries))
        )
        for kind, function in (("forward", forward), ("gradients", gradients)):
            calls[length, which, kind] = (function, inputs)
            rows[length, which, kind] = {
                "rows": which,
                "pass": kind,
                "length": length,
                "batch": batch,
                **count_work(
                    kind,
                    batch * _HEADS * length * _LANDMARKS,
                    batch * _HEADS * (length + _LANDMARKS),
                    _HEAD_DIM,
                ),
            }
    for name, row in _compile_and_time(calls, "Gaussian passes", deadline).items():
        rows[name] |= row
        if "median_seconds" in row:
            rows[name]["shares"] = {
                unit: max(
                    rows[name]["operations"] / peaks[unit], rows[name]["bytes"] / peaks["bytes"]
                )
                / row["median_seconds"]
                for unit in ("float32", "tf32")
                if {unit, "bytes"} <= peaks.keys()
            }
    return list(rows.values())


def step_rows(
    names: tuple[str, ...], tasks: tuple[str, ...], deadline: float
) -> list[dict[str, Any]]:
    """Rows of measure_steps for some attentions and tasks, with the paper's hours."""
    variant = "small" if _SMALL.value else ""
    configs = {
        (task, name): importlib.import_module(f"configs.{task}").get_config(f"{name},{variant}")
        for task, name in itertools.product(tasks, names)
    }
    rows = [
        {"task": task, "attention": name, **row}
        for (task, name), row in measure_steps(
            configs,
            _ROUNDS,
            f"steps of {', '.join(tasks)}",
            workers=os.cpu_count() or 1,
            deadline=deadline,
        ).items()
    ]
    for row in rows:
        if "median_seconds_per_step" in row and not _SMALL.value:
            row["hours_of_50000_steps"] = 50_000 * row["median_seconds_per_step"] / 3600
            row["paper_v100_hours"] = PAPER_HOURS[row["attention"]][row["task"]]
    return rows


def print_tables(result: Mapping[str, Any]) -> None:
    """What a section measured, or why not, in a line each."""
    for unit, value in result["measured_peaks"].items():
        print(f"measured peak, {unit:10}{value / 1e12:10.2f} T/s")
    for row in result["gaussian_passes"]:
        what = f"{row['rows']:8}{row['length']:9,}  {row['pass']:10}"
        if "median_seconds" in row:
            shares = (f"{100 * share:6.1f} % of {unit}" for unit, share in row["shares"].items())
            print(f"{what}{1e3 * row['median_seconds']:9.3f} ms{','.join(shares)}")
        else:
            print(f"{what}{row['skipped']}")
    print(attention_cells.tables(result["attention"]["cells"]))
    for row in result["steps"]:
        what = f"{row['task']:11}{row['attention']:14}"
        if "steps_per_second" in row:
            what += f"{row['steps_per_second']:9.2f} steps/s"
            what += f"{row['temporaries_bytes'] / 2**20:10,.0f} MiB"
            if "paper_v100_hours" in row:
                what += f"{row['hours_of_50000_steps']:9.2f} h for 50,000"
                what += f"{row['paper_v100_hours']:7.2f} h in the paper"
            print(what)
        else:
            print(f"{what}{row['skipped']}")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The attentions as experiments/speed.py draws them, the steps, and the roofline's shares."""
    figure, axes = plt.subplots(2, 3, figsize=(21, 9), layout="tight")
    cells = result["attention"]["cells"]
    if any("temporaries_bytes" in cell for cell in cells):
        attention_cells.draw(axes[:, :2], cells, result["attention"]["exponents"])
    for name, (color, marker) in attention_cells.STYLES.items():
        rows = [r for r in result["steps"] if r["attention"] == name and "steps_per_second" in r]
        if rows:
            axes[0, 2].plot(
                [TASKS.index(row["task"]) for row in rows],
                [row["steps_per_second"] for row in rows],
                color=color,
                marker=marker,
                linestyle="none",
                markersize=10 if name == "skyformer" else 6,
                label=name,
            )
    axes[0, 2].set(title="training steps a second", yscale="log")
    axes[0, 2].set_xticks(range(len(TASKS)), TASKS)
    axes[0, 2].grid(which="major", alpha=0.3)
    if axes[0, 2].lines:
        axes[0, 2].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)

    rows = [row for row in result["gaussian_passes"] if "shares" in row]
    places = range(len(rows))
    for i, unit in enumerate(rows[0]["shares"] if rows else ()):
        axes[1, 2].barh(
            [place + 0.35 * i for place in places],
            [100 * row["shares"][unit] for row in rows],
            0.35,
            color=("#0072B2", "#E69F00")[i],
            label=f"of the {unit} peak",
        )
    axes[1, 2].set(title="Gaussian passes, % of what the device can do")
    axes[1, 2].set_yticks(
        places, [f"{row['rows']}, {row['length']:,}, {row['pass']}" for row in rows]
    )
    if rows:
        axes[1, 2].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(
        f"{result['device']}, {result['attention']['settings']['tokens']:,} tokens in a call, "
        f"{_HEADS} heads of {_HEAD_DIM}"
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Measures one section after the other, writing each; prints tables and plots at the end."""
    start = time.monotonic()
    if jax.default_backend() == "cpu" and not _SMALL.value:
        raise UserError("jax finds no accelerator here; --small tries the script on a CPU")
    deadline = start + 60 * _MINUTES.value
    path = Path(_OUT.value)
    small = _SMALL.value
    settings = attention_cells.Settings(
        attentions=(*(_FIRST if small else attention.NAMES), "kernelized-dense", "flash"),
        dtypes=attention_cells.DTYPES,
        passes=attention_cells.PASSES,
        tokens=512 if small else 131_072,
        heads=_HEADS,
        head_dim=_HEAD_DIM,
        rounds=_ROUNDS,
        max_seconds=2,
        max_temporaries=attention_cells.device_memory(),
    )
    lengths = (128, 256) if small else (1024, 4096, 16_384, 65_536, 131_072)
    result: dict[str, Any] = {
        "what": "Gaussian passes against the device's peaks; attention functions at a fixed number "
        "of tokens in a call; training steps of the paper's settings on random tokens",
        **provenance(jax.device_count()),
        "seed": 0,
        "minutes": _MINUTES.value,
        "small": small,
        "data_sheet_peaks": PEAKS.get(jax.devices()[0].device_kind),
        "measured_peaks": {},
        "gaussian_passes": [],
        "attention": {"settings": dataclasses.asdict(settings), "cells": [], "exponents": []},
        "steps": [],
    }
    result["measured_peaks"] = measured_peaks(deadline)
    result["gaussian_passes"] = measure_roofline(
        settings.tokens,
        lengths[:1] if small else (lengths[1], lengths[-1]),
        result["data_sheet_peaks"] or result["measured_peaks"],
        deadline,
    )
    write_json(path, result)

    cells = result["attention"]["cells"]
    for length in lengths:
        cells += attention_cells.measure_length(
            settings,
            length,
            tuple(cells),
            workers=os.cpu_count() or 1,
            deadline=start + _STEPS_FROM * 60 * _MINUTES.value,
        )
        result["attention"]["exponents"] = attention_cells.exponents(cells)
        write_json(path, result)

    others = tuple(name for name in attention.NAMES if name not in _FIRST)
    groups = [(_FIRST, TASKS)] + [(others, (task,)) for task in TASKS if not small]
    for names, tasks in groups:
        result["steps"] += step_rows(names, tasks, deadline)
        write_json(path, result)
    print_tables(result)
    plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
