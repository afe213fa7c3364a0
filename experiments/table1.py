r"""Test accuracy of nine attentions on five tasks, the paper's table 1.

    python experiments/table1.py                        # 135 runs of 50,000 steps
    python experiments/table1.py --small --configs=listops,text,image,pathfinder --seeds=0,1 \
        --set=text:data.source=DIR --set=image:data.source=DIR

This is sweep.py, which says how it goes on after an interruption, what its flags do and what the
JSON holds, with a picture. --small trains the variant small of the configs for fewer steps, Text
cut at 256 bytes: minutes a cell on a CPU core. figure2.py draws the curves of the same runs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json

from absl import flags

from experiments import grid_flags, sweep
from skyformer_jax import cli
from skyformer_jax.report import pictures

grid_flags.set_defaults(dir="runs/table1", out="results/table1.json")
flags.adopt_module_key_flags(sweep)


def _draw() -> None:
    path = Path(grid_flags.OUT.value)
    result = json.loads(path.read_text()) if path.exists() else {"cells": []}
    if any(cell["status"] == "finished" for cell in result["cells"]):
        pictures.table1(result, path.with_suffix(".png"))


def main() -> None:
    """Sweeps, and draws what there is, after a signal or with failed cells too."""
    try:
        sweep.main()
    except SystemExit:
        _draw()
        raise
    _draw()


if __name__ == "__main__":
    cli.run(main)
