"""Measures time and temporaries of each attention function against the length, side by side.

    python -m experiments.benchmarks.speed --lengths=1024,2048,4096,8192,16384

Measures the forward pass, and the gradients of a weighted sum of the output with respect to query,
key, value and trained variables, on normal float32 inputs without padding, one sequence per call.
Every function is compiled ahead of time, and the compilation is timed separately. A function gets
what a layer passes to it in training: the variables that the layer keeps, and a PRNG key where
training draws anew in every step. So the time includes drawing Skyformer's landmarks, Informer's
sample and Reformer's hashes. At each length the functions take turns in one process, and medians
are reported. Temporaries are what the compiled program says it needs. A program that needs more
than half of a CPU's memory, or more than all of a GPU's, is not run. If XLA hides temporaries in
fusions on a CPU, XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= shows them.

Writes JSON after each length, with commit, versions and hardware, and a plot beside it. Started
again after an interruption, it measures the missing lengths. --small measures 64, 128 and 256
tokens, unless --lengths names others, in one round.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks import attention_cells, common_flags
from experiments.benchmarks.attention_cells import Settings
from experiments.records import as_read, provenance, resume, write_json
from skyformer_jax import attention, cli
from skyformer_jax.errors import one_of

_ATTENTIONS = flags.DEFINE_list(
    "attentions", [*attention.NAMES, "kernelized-dense"], "Attentions to measure."
)
_LENGTHS = flags.DEFINE_list("lengths", "1024,2048,4096,8192,16384", "Tokens of a sequence.")
_PASSES = flags.DEFINE_list("passes", "forward,gradients", "Passes to measure.")
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds",
    30,
    "A call that takes longer is timed once, and not at greater lengths.",
    lower_bound=0,
)
_ROUNDS = common_flags.rounds(5)
_SMALL = common_flags.small()
_OUT = common_flags.out("results/speed_cpu.json")


def measure(
    settings: Settings, lengths: Sequence[int], path: Path, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Measures length by length into a JSON file, and resumes after an interruption.

    The file is written whole after each length. If it exists with the same settings and the same
    header, which has the commit, only the missing lengths are measured, in ascending order.

    Returns:
      The content of the file: the header, settings, cells (see attention_cells.measure_length) and
      exponents.
    """
    header = as_read({**header, "settings": dataclasses.asdict(settings)})
    cells = resume(path, header, field="cells")
    result = {**header, "cells": cells, "exponents": attention_cells.exponents(cells)}
    for length in lengths:
        if all(cell["length"] != length for cell in cells):
            shorter = [cell for cell in cells if cell["length"] < length]
            cells += attention_cells.measure_length(settings, length, shorter)
            cells.sort(key=lambda cell: cell["length"])
            result["exponents"] = attention_cells.exponents(cells)
            write_json(path, result)
    return result


def main() -> None:
    """Measures, plots, and prints the table."""
    if _SMALL.value:
        common_flags.set_defaults(lengths="64,128,256", rounds=1)
    for name in _ATTENTIONS.value or [""]:
        one_of("attention", name, attention_cells.ATTENTIONS)
    for kind in _PASSES.value or [""]:
        one_of("pass", kind, attention_cells.PASSES)
    lengths = common_flags.integers(_LENGTHS)
    settings = Settings(
        attentions=tuple(_ATTENTIONS.value),
        dtypes=("float32",),
        passes=tuple(_PASSES.value),
        batch=1,
        **attention_cells.PAPER_HEADS,
        rounds=_ROUNDS.value,
        max_seconds=_MAX_SECONDS.value,
        max_temporaries=attention_cells.device_memory(),
    )
    header = {
        "what": "attention functions, compiled: seconds of a call by turns, and bytes that the "
        "program needs; exponents are slopes in log-log from 4096 tokens on",
        **provenance(1),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "small": _SMALL.value,
    }
    path = Path(_OUT.value)
    result = measure(settings, lengths, path, header)
    title = (
        f"{result['device']}, {result['cores']} cores, batch {settings.batch}, "
        f"{settings.heads} heads of {settings.head_dim}, {settings.dtypes[0]}"
    )
    attention_cells.plot(result, title, path.with_suffix(".png"))
    print(attention_cells.tables(result["cells"]))


if __name__ == "__main__":
    cli.run(main)
