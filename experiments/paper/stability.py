"""Measures the instability score of the paper's appendix F over the first steps of training.

    python -m experiments.paper.stability --seeds=0
    python -m experiments.paper.stability --small --configs=listops

    tau_i = ||f(x_i, W_i) - f(x_i, W_(i-1))||_F^2 / ||W_i - W_(i-1)||_F^2

Here f is the embedding of the real tokens after the last block and the final norm, x_i is the batch
of step i, and W are all parameters except the head's (analysis.py). The paper gives the mean over
the first 20 steps, as a ratio to softmax's. Training follows configs/, including dropout. f is
evaluated without dropout, and with the same landmarks before and after the step. The paper does not
say whether its f was, so a second score uses dropout and landmarks that are drawn anew each time.
--examples=N evaluates f on the first N examples of each batch.

A task whose data are missing is skipped, with a line. Cells that an earlier call measured are not
measured again. --small takes a minute.

Writes --out after each cell: the score of each step, also before the final norm and with noise, and
the number of examples of each batch on which f was evaluated; and the picture beside it.
"""

import jax
from absl import flags

from experiments.paper import analysis, first_steps, grid_flags
from experiments.paper.cell_rows import keep_rows
from experiments.paper.grid import Cell, parse_config
from experiments.paper.report import pictures
from experiments.records import Row
from skyformer_jax import cli

grid_flags.set_defaults(
    attentions="softmax,kernelized,nystromformer,skyformer",
    dir="runs/first_steps",
    out="results/stability.json",
)
flags.adopt_module_key_flags(grid_flags)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of training.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 0, "Examples of each batch; 0: all.", lower_bound=0)


def measure(cell: Cell) -> Row:
    """Computes the scores of a cell's first steps; returns the fields of its row."""
    run = first_steps.one_device_run(parse_config(cell.arguments))
    split, train = run.load_split("train"), run.config.train
    weights, where = first_steps.train(run, split, _STEPS.value, cell.workdir)
    scores = []
    for i, batch in enumerate(first_steps.first_batches(run, split, _STEPS.value)):
        some = jax.tree.map(lambda x: x[: _EXAMPLES.value or len(x)], batch)
        inputs = first_steps.model_inputs(run, some)
        rng = jax.random.fold_in(jax.random.key(run.config.seed), i)
        scores.append(analysis.instability(run.model, *weights[i : i + 2], *inputs, rng))
    return {
        "learning_rate": train.learning_rate,
        "warmup_steps": train.warmup_steps,
        "examples": len(some.label),
        "instability": [score.normed for score in scores],
        "instability_before_norm": [score.raw for score in scores],
        "instability_with_noise": [score.with_noise for score in scores],
        "data": split.checksum(),
        "provenance": where,
    }


def main() -> None:
    """Measures cell after cell, and writes JSON and picture after each."""
    keep_rows(
        "instability score (appendix F) of each of the first steps of training: evaluated, before "
        "the final norm, with the noise of training",
        {"steps": _STEPS.value, "examples": _EXAMPLES.value},
        measure,
        pictures.stability,
    )


if __name__ == "__main__":
    cli.run(main)
