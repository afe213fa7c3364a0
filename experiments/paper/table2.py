"""Measures hours of 50,000 steps and peak memory, the paper's table 2.

    python -m experiments.paper.table2                   # on an accelerator: the full batches
    python -m experiments.paper.table2 --small_batches   # of 16,384 tokens, for ratios on a CPU
    python -m experiments.paper.table2 --small           # the reduced setting

Measures a training step of each attention at the task's full length, on random tokens, because time
and memory do not depend on them. The attentions of a task are compiled ahead of time and take turns
in one process, so that their ratios are side by side. Peak memory is what the compiled step says it
needs for arguments, results and temporaries. No activations are recomputed and no gradients are
accumulated unless --set asks for it, except on a CPU, where a batch is computed in parts that fit
its caches (docs/speed.md).

Writes --out after each task (hours are those of 50,000 such steps), and the picture beside it.
Started again, it measures the missing tasks.
"""

from pathlib import Path

import jax
from absl import flags

from experiments.benchmarks.timing import measure_steps
from experiments.paper import grid_flags, published
from experiments.paper.grid import Cell, parse_config
from experiments.paper.report import pictures
from experiments.records import Row, provenance, resume, write_json
from skyformer_jax import cli
from skyformer_jax.progress import say

grid_flags.set_defaults(seeds="0", out="results/table2.json")
flags.adopt_module_key_flags(grid_flags)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each attention takes.", lower_bound=1)
_SMALL_BATCHES = flags.DEFINE_bool(
    "small_batches", False, "Batches of 16,384 tokens, at the same length."
)

_TOKENS = 16_384


def measure(cells: list[Cell], name: str) -> list[Row]:
    """Measures a task; returns its rows."""
    configs = {cell.attention: parse_config(cell.arguments) for cell in cells}
    full_batch_sizes = {attention: config.train.batch_size for attention, config in configs.items()}
    if _SMALL_BATCHES.value:
        for config in configs.values():
            tokens = config.model.num_documents * config.model.max_length
            config.train.batch_size = max(1, _TOKENS // tokens)
    rows = []
    for attention, found in measure_steps(configs, _ROUNDS.value, name).items():
        config = configs[attention]
        row = {
            "config": name,
            "attention": attention,
            "batch_size": config.train.batch_size,
            "full_batch_size": full_batch_sizes[attention],
            "length": config.model.max_length,
        }
        if "skipped" in found:
            row["skipped"] = found["skipped"]
        else:
            seconds = found["median_seconds_per_step"]
            row |= {
                "seconds": found["seconds_per_step"],
                "seconds_per_step": seconds,
                "hours": published.STEPS * seconds / 3600,
            }
            fields = ("bytes", "temporaries_bytes", "compile_seconds")
            row |= {field: found[field] for field in fields}
        rows.append(row)
    return rows


def main() -> None:
    """Measures task after task, and writes JSON and picture after each."""
    path, cells = Path(grid_flags.OUT.value), grid_flags.make_cells()
    header = {
        "what": "training step of the full model, random tokens at full length",
        **provenance(jax.device_count()),
        "small": _SMALL_BATCHES.value,
        "variant": grid_flags.variant(),
        "overrides": grid_flags.overrides(),
        "attentions": grid_flags.ATTENTIONS.value,
        "rounds": _ROUNDS.value,
        "seed": 0,
    }
    rows = resume(path, header)
    for name in dict.fromkeys(cell.config for cell in cells):
        if any(row["config"] == name for row in rows):
            say(f"{name} is measured already")
            continue
        rows += measure([cell for cell in cells if cell.config == name], name)
        result = {**header, "rows": rows}
        write_json(path, result)
        pictures.table2(result, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
