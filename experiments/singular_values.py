"""Singular values of the second layer's attention output, the paper's appendix figure 2.

    python experiments/singular_values.py --seeds=0
    python experiments/singular_values.py --small --configs=listops

Of each of the first --examples validation examples, the output [real tokens, width] of the last
attention layer: its singular values over the greatest, before training and after the first --steps
steps of it, which stability.py also takes and which are kept in --dir.

A task whose data are not there is skipped, with a line; so is what an earlier run of this code
finished. --small takes the variant small of the configs, which needs a minute.

Writes --out after each cell, beside provenance and what was asked for:

    rows  config, attention, seed, batch_size, length, examples, tokens (real ones, on average),
          initial and trained (each the mean over the examples of the values, descending from 1),
          departures (see sweep.py), data (a checksum of the validation split), provenance

and the picture beside it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import flags

from experiments import first_steps, grid_flags
from experiments.cell_rows import keep_rows
from experiments.grid import Cell, parse_config
from skyformer_jax import analysis, cli
from skyformer_jax.data.batches import make_batch
from skyformer_jax.models import build_model
from skyformer_jax.report import pictures
from skyformer_jax.training import evaluation

grid_flags.set_defaults(dir="runs/first_steps", out="results/singular_values.json")
flags.adopt_module_key_flags(grid_flags)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of training.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 16, "Of the validation split.", lower_bound=1)


def measure(cell: Cell) -> dict[str, object]:
    """The singular values of a cell, and what they are of."""
    config = parse_config(cell.arguments)
    split = evaluation.load_split(config, "train")
    weights, where = first_steps.train(config, split, _STEPS.value, cell.workdir)
    model = build_model(config)
    validation = evaluation.load_split(config, "validation")
    rows = np.arange(min(_EXAMPLES.value, len(validation)))
    tokens, mask = first_steps.read(config, make_batch(validation, rows, config.model.max_length))

    @jax.jit
    def attend(variables: object, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        outputs = analysis.outputs_of("attention_layer", model, variables, tokens, mask)
        return outputs[-1]

    found = {}
    for when, variables in (("initial", weights[0]), ("trained", weights[-1])):
        values = []
        for i in range(len(rows)):  # one at a time, for the memory
            out = np.asarray(attend(variables, tokens[i : i + 1], mask[i : i + 1]))
            real = np.asarray(mask[i : i + 1]).reshape(out.shape[:2])
            values.extend(analysis.singular_values(out, real))
        found[when] = np.mean(values, axis=0).tolist()
    return {
        "examples": len(rows),
        "tokens": float(np.asarray(mask).sum(axis=-1).mean()),
        **found,
        "data": validation.checksum(),
        "provenance": where,
    }


def main() -> None:
    """Measures cell after cell; writes JSON and picture after each."""
    keep_rows(
        "singular values of the last attention layer's output, over the greatest, before training "
        "and after its first steps",
        {"steps": _STEPS.value, "examples": _EXAMPLES.value},
        measure,
        pictures.singular_values,
    )


if __name__ == "__main__":
    cli.run(main)
