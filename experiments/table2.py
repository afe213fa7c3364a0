"""Hours of 50,000 steps and peak memory, the paper's table 2.

    python experiments/table2.py            # on an accelerator: the full batches
    python experiments/table2.py --small    # batches of 16,384 tokens, for ratios on a CPU

A training step of each attention on random tokens at the task's full length, which neither depends
on: the attentions of a task are compiled ahead of time and take turns in one process, so that their
ratios are side by side. Peak memory is what the compiled step says that it needs: its arguments,
results and temporaries. Beside the nine there is no recomputation of activations or gradient
accumulation unless --set asks for it, but on a CPU, where a batch is computed in parts that fit its
caches (docs/speed.md).

Writes --out after each task, beside provenance:

    rows  config, attention, batch_size, full_batch_size, length, seconds (of each turn),
          seconds_per_step (their median), hours (of 50,000 such steps), bytes, temporaries_bytes,
          compile_seconds; or skipped, the reason

and the picture beside it. Started again, it goes on with the tasks that are missing.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from absl import flags

from experiments import grid_flags
from experiments.grid import Cell, make_grid, parse_config
from experiments.provenance import provenance, write_json
from experiments.timing import measure_steps
from skyformer_jax import cli
from skyformer_jax.progress import say
from skyformer_jax.report import paper, pictures
from skyformer_jax.training import steps

grid_flags.set_defaults(seeds="0", out="results/table2.json")
flags.adopt_module_key_flags(grid_flags)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each attention takes.", lower_bound=1)

_SMALL_TOKENS = 16_384


def measure(cells: list[Cell], name: str) -> list[dict[str, object]]:
    """The rows of a task."""
    configs = {cell.attention: parse_config(cell.arguments) for cell in cells}
    full_batch_sizes = {name: config.train.batch_size for name, config in configs.items()}
    for config in configs.values():
        if grid_flags.SMALL.value:
            tokens = math.prod(steps.token_shape(config))
            config.train.batch_size = max(1, _SMALL_TOKENS // tokens)
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
            rows.append(row | {"skipped": found["skipped"]})
            continue
        seconds = found["median_seconds_per_step"]
        rows.append(
            row
            | {
                "seconds": found["seconds_per_step"],
                "seconds_per_step": seconds,
                "hours": paper.STEPS * seconds / 3600,
                "bytes": found["bytes"],
                "temporaries_bytes": found["temporaries_bytes"],
                "compile_seconds": found["compile_seconds"],
            }
        )
    return rows


def main() -> None:
    """Measures task after task; writes JSON and picture after each."""
    path = Path(grid_flags.OUT.value)
    cells = make_grid(
        grid_flags.CONFIGS.value,
        grid_flags.ATTENTIONS.value,
        grid_flags.SEEDS.value,
        grid_flags.VARIANT.value,  # --small is of the batch alone
        grid_flags.SET.value,
        Path(grid_flags.DIR.value),
    )
    header = {
        "what": "training step of the full model, random tokens at full length",
        **provenance(jax.device_count()),
        "small": grid_flags.SMALL.value,
        "variant": grid_flags.VARIANT.value,
        "overrides": grid_flags.SET.value,
        "attentions": grid_flags.ATTENTIONS.value,
        "rounds": _ROUNDS.value,
        "seed": 0,
    }
    rows = []
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(name) == value for name, value in header.items()):
            rows = before["rows"]
        else:
            say(f"{path} is of other code, settings or hardware: begun anew")
    for name in dict.fromkeys(cell.config for cell in cells):
        if any(row["config"] == name for row in rows):
            say(f"{name} is there")
            continue
        rows += measure([cell for cell in cells if cell.config == name], name)
        result = {**header, "rows": rows}
        write_json(path, result)
        pictures.table2(result, path.with_suffix(".png"))
    for row in rows:
        found = row.get("skipped") or (
            f"{row['seconds_per_step']:9.4f} s a step{row['hours']:9.2f} h"
            f"{row['bytes'] / 2**20:10,.0f} MiB"
        )
        print(f"{row['config']:12}{row['attention']:15}{found}")


if __name__ == "__main__":
    cli.run(main)
