"""The sections of the accelerator's result: what each one measures, and how it is shown."""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import attention_cells
from experiments.benchmarks.accelerator import numbers, roofline, training_runs
from experiments.benchmarks.accelerator.settings import Settings
from experiments.benchmarks.timing import as_text as rows_as_text
from experiments.benchmarks.timing import measure_steps
from experiments.paper import published
from experiments.records import Row
from skyformer_jax import attention
from skyformer_jax.attention.platforms import IMPLEMENTATIONS

Found = Iterator[dict[str, Any]]

TASKS = ("text", "listops", "pathfinder", "image", "retrieval")
_FIRST = ("skyformer", "softmax", "kernelized")
_EXACT_AND_OURS = (*_FIRST, *attention_cells.EXTRAS)
_ROUNDS = 3
# Programs compiled at a time. XLA compiles a program with many threads and tries its kernels on the
# device; compiling sixteen at a time took longer than compiling them one by one.
_WORKERS = 2


def _numbers(settings: Settings) -> Found:
    length = 128 if settings.small else 1024
    rows = []
    for row in numbers.check(length, settings.deadline):
        rows.append(row)
        yield {"length": length, "rows": rows}


def _gaussian(settings: Settings) -> Found:
    data_sheet = roofline.PEAKS.get(jax.devices()[0].device_kind)
    peaks = roofline.measure_peaks(settings.small, settings.deadline)
    rows = roofline.measure_roofline(
        512 if settings.small else 131_072,
        (128,) if settings.small else (4096, 131_072),
        ("chunked",) if settings.small else tuple(x for x in IMPLEMENTATIONS if x != "dense"),
        data_sheet or peaks,
        settings.deadline,
    )
    yield {"data_sheet_peaks": data_sheet, "measured_peaks": peaks, "rows": rows}


def _attention(settings: Settings) -> Found:
    """Measures the most interesting groups first, so that the deadline costs the others."""
    others = tuple(name for name in attention_cells.ATTENTIONS if name not in _EXACT_AND_OURS)
    lengths = (128, 256) if settings.small else (4096, 16_384, 1024, 131_072)
    groups = [
        (kind, names, length)
        for kind in ("gradients", "forward")
        for names in ((_EXACT_AND_OURS,) if settings.small else (_EXACT_AND_OURS, others))
        for length in lengths
    ]
    cells: list[Row] = []
    for kind, names, length in groups:
        cell_settings = attention_cells.Settings(
            attentions=names,
            dtypes=attention_cells.DTYPES,
            passes=(kind,),
            tokens=512 if settings.small else 131_072,
            **attention_cells.PAPER_HEADS,
            rounds=_ROUNDS,
            max_seconds=2,
            max_temporaries=attention_cells.device_memory(),
        )
        shorter = [cell for cell in cells if cell["length"] < length]
        cells += attention_cells.measure_length(
            cell_settings, length, shorter, workers=_WORKERS, deadline=settings.deadline
        )
        cells.sort(key=lambda cell: (attention_cells.PASSES.index(cell["pass"]), cell["length"]))
        of_all = {"attentions": attention_cells.ATTENTIONS, "passes": attention_cells.PASSES}
        yield {
            "settings": dataclasses.asdict(cell_settings) | of_all,
            "cells": cells,
            "exponents": attention_cells.exponents(cells),
        }


def _steps(settings: Settings) -> Found:
    others = tuple(name for name in attention.NAMES if name not in _FIRST)
    groups = [(("skyformer",), settings.num_seeds), (("skyformer",), 1), (_FIRST[1:], 1)]
    groups += [] if settings.small else [(others, 1)]
    rows: list[Row] = []
    for (names, num_seeds), task in itertools.product(groups, TASKS):
        rows += step_rows(names, num_seeds, task, settings)
        yield {"rows": rows}


def step_rows(names: tuple[str, ...], num_seeds: int, task: str, settings: Settings) -> list[Row]:
    """Returns rows of measure_steps for attentions on one task, with the paper's hours."""
    variant = "small" if settings.small else ""
    configs = {}
    for name in names:
        configs[name] = importlib.import_module(f"configs.{task}").get_config(f"{name},{variant}")
        configs[name].num_seeds = num_seeds
    what = f"steps of {task}, {', '.join(names)}"
    measured = measure_steps(
        configs, _ROUNDS, what, workers=_WORKERS, max_seconds=1, deadline=settings.deadline
    )
    rows = []
    for name, row in measured.items():
        rows.append({"task": task, "attention": name, "num_seeds": num_seeds, **row})
        if "median_seconds_per_step" in row and not settings.small:
            seconds = published.STEPS * row["median_seconds_per_step"]
            rows[-1]["hours_of_50000_steps"] = seconds / 3600
            rows[-1]["paper_v100_hours"] = num_seeds * published.HOURS[name][task]
    return rows


SECTIONS: Mapping[str, Callable[[Settings], Found]] = {
    "numbers": _numbers,
    "gaussian": _gaussian,
    "attention": _attention,
    "steps": _steps,
    "training": training_runs.train_in_turn,
}


def as_text(result: Mapping[str, Any]) -> str:
    """Formats the tables of the sections that a result has."""
    fields = {
        "numbers": (),
        "gaussian": ("implementation", "rows", "pass", "length"),
        "attention": ("attention", "dtype", "pass", "length"),
        "steps": ("task", "attention", "num_seeds"),
        "training": (),
    }
    tables = []
    for section, names in fields.items():
        rows = result.get(section, {}).get("cells" if section == "attention" else "rows", [])
        as_lines = {"numbers": numbers.as_text, "training": training_runs.as_text}
        tables.append(
            as_lines[section](rows) if section in as_lines else rows_as_text(rows, *names)
        )
    return "\n".join(table for table in tables if table)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the attention section, if the result has it."""
    found = result.get("attention", {})
    if found.get("cells"):
        heads, head_dim = attention_cells.PAPER_HEADS.values()
        call = f"{found['settings']['tokens']:,} tokens in a call, {heads} heads of {head_dim}"
        attention_cells.plot(found, f"{result['device']}, {call}", path)
