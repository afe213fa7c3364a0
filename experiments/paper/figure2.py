"""Makes curves of validation accuracy and loss against training time, the paper's figure 2.

    python -m experiments.paper.table1 && python -m experiments.paper.figure2

The paper's appendix has such curves as well. The curves here are those of the runs that table1.py
trained in --dir; give both scripts the same flags, including --small. A time is a number of steps
times the seconds of a step. The seconds are measured here, with the attentions of a task side by
side in one process on random tokens, because the runs themselves may have shared their machine with
others. Validation and compilation are left out.

Writes --out with the curves of each cell and the provenance of the times, and the picture beside
it. The provenance of the cells is in table1.json.
"""

import collections
from pathlib import Path

import jax
from absl import flags

from experiments.benchmarks.timing import measure_steps
from experiments.paper import grid_flags
from experiments.paper.cell_results import read_cell
from experiments.paper.grid import Cell, parse_config
from experiments.paper.report import pictures
from experiments.records import Row, provenance, write_json
from skyformer_jax import cli
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say
from skyformer_jax.training.logs import read_metrics

grid_flags.set_defaults(dir="runs/table1", out="results/figure2.json")
flags.adopt_module_key_flags(grid_flags)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each attention takes.", lower_bound=1)


def measure(cells: list[tuple[Cell, Row]], name: str) -> list[Row]:
    """Returns the rows of a task, given its finished cells and their results."""
    configs = {cell.attention: parse_config(cell.arguments) for cell, _ in cells}
    times = measure_steps(configs, _ROUNDS.value, name)
    fields = ("config", "attention", "seed", "num_steps", "batch_size", "departures")
    rows = []
    for cell, result in cells:
        time = times[cell.attention]
        if "skipped" in time:
            say(f"{cell.name}: not timed: {time['skipped']}; left out")
            continue
        seconds = time["median_seconds_per_step"]
        curves: dict[str, list[dict[str, float]]] = {"validation": [], "train": []}
        for entry in read_metrics(cell.workdir / "metrics.jsonl"):
            if entry["split"] in curves:
                point = {"step": entry["step"], "seconds": entry["step"] * seconds}
                point |= {field: entry[field] for field in ("loss", "accuracy")}
                curves[entry["split"]].append(point)
        rows.append(
            {
                **{field: result[field] for field in fields},
                "seconds_per_step": seconds,
                "turns": time["seconds_per_step"],
                "validation": curves["validation"],
                "training": curves["train"],
            }
        )
    return rows


def main() -> None:
    """Times the steps of the finished runs, and writes their curves."""
    by_config = collections.defaultdict(list)
    for cell in grid_flags.make_cells():
        result = read_cell(cell)
        if result["status"] == "finished":
            by_config[cell.config].append((cell, result))
        else:
            say(f"{cell.name}: {result['status']}; left out")
    if not by_config:
        raise UserError(
            f"{grid_flags.DIR.value} has no finished run of these settings: start python -m "
            "experiments.paper.table1 with the same flags first"
        )
    path = Path(grid_flags.OUT.value)
    result = {
        "what": "validation and training curves of the runs of table1.py against steps times "
        "the seconds of a step",
        **provenance(jax.device_count()),
        "variant": grid_flags.variant(),
        "rounds": _ROUNDS.value,
        "rows": [],
    }
    for config, cells in by_config.items():
        result["rows"] += measure(cells, config)
        write_json(path, result)
        pictures.figure2(result, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
