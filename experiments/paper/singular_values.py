"""Computes singular values of the second layer's attention output, the paper's appendix figure 2.

    python -m experiments.paper.singular_values --seeds=0
    python -m experiments.paper.singular_values --small --configs=listops

For each of the first --examples validation examples, it computes the singular values of the last
attention layer's output [real tokens, width], divided by the greatest, before training and after
its first --steps steps. stability.py takes the same steps, and they are kept in --dir.

A task whose data are missing is skipped, with a line. Cells that an earlier call measured are not
measured again. --small takes a minute.

Writes --out after each cell: the means over the examples of the values, descending from 1, and of
the number of real tokens; and the picture beside it.
"""

import jax
import numpy as np
from absl import flags

from experiments.paper import analysis, first_steps, grid_flags
from experiments.paper.cell_rows import keep_rows
from experiments.paper.grid import Cell, parse_config
from experiments.paper.report import pictures
from experiments.records import Row
from skyformer_jax import cli
from skyformer_jax.data.batches import make_batch

grid_flags.set_defaults(dir="runs/first_steps", out="results/singular_values.json")
flags.adopt_module_key_flags(grid_flags)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of training.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 16, "Validation examples.", lower_bound=1)


def measure(cell: Cell) -> Row:
    """Computes the singular values of a cell; returns the fields of its row."""
    run = first_steps.one_device_run(parse_config(cell.arguments))
    weights, where = first_steps.train(run, run.load_split("train"), _STEPS.value, cell.workdir)
    validation = run.load_split("validation")
    rows = np.arange(min(_EXAMPLES.value, len(validation)))
    batch = make_batch(validation, rows, run.config.model.max_length)
    tokens, mask = first_steps.model_inputs(run, batch)

    @jax.jit
    def attend(variables: object, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return analysis.outputs_of("attention_layer", run.model, variables, tokens, mask)[-1]

    def spectrum(variables: object) -> list[float]:
        values = []
        for i in range(len(rows)):  # one example at a time, to limit the memory
            out = np.asarray(attend(variables, tokens[i : i + 1], mask[i : i + 1]))
            real = np.asarray(mask[i : i + 1]).reshape(out.shape[:2])
            values.extend(analysis.singular_values(out, real))
        return np.mean(values, axis=0).tolist()

    return {
        "examples": len(rows),
        "tokens": float(np.asarray(mask).sum(axis=-1).mean()),
        "initial": spectrum(weights[0]),
        "trained": spectrum(weights[-1]),
        "data": validation.checksum(),
        "provenance": where,
    }


def main() -> None:
    """Measures cell after cell, and writes JSON and picture after each."""
    keep_rows(
        "singular values of the last attention layer's output, over the greatest, before training "
        "and after its first steps",
        {"steps": _STEPS.value, "examples": _EXAMPLES.value},
        measure,
        pictures.singular_values,
    )


if __name__ == "__main__":
    cli.run(main)
