r"""Measures the test accuracy of nine attentions on five tasks, the paper's table 1.

    python -m experiments.paper.table1                        # 135 runs of 50,000 steps
    python -m experiments.paper.table1 --small --configs=listops,text,image,pathfinder \
        --seeds=0,1 --set=text:data.source=DIR --set=image:data.source=DIR

Runs sweep.py and draws a picture. sweep.py describes the flags, the JSON, and how to resume after
an interruption. --small takes minutes per cell on a CPU core. figure2.py draws the curves of the
same runs.
"""

import sys
from pathlib import Path

from absl import flags

from experiments.paper import grid_flags, sweep
from experiments.paper.report import pictures
from experiments.records import read_json
from skyformer_jax import cli

grid_flags.set_defaults(dir="runs/table1", out="results/table1.json")
flags.adopt_module_key_flags(sweep)


def main() -> None:
    """Runs the sweep, and draws the finished cells, even after a signal or failures."""
    status = 0
    try:
        sweep.main()
    except SystemExit as stopped:
        status = stopped.code
    path = Path(grid_flags.OUT.value)
    result = read_json(path) if path.exists() else {"cells": []}
    if any(cell["status"] == "finished" for cell in result["cells"]):
        pictures.table1(result, path.with_suffix(".png"))
    sys.exit(status)


if __name__ == "__main__":
    cli.run(main)
