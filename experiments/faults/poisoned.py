"""Runs train.py with one token outside the vocabulary, which makes the model return NaN.

    python -m experiments.faults.poisoned --poisoned_step=50 --config=configs/quickstart.py ...

This is a fault of the soak. The token is in the first example of that step's batch.
"""

import functools
from collections.abc import Iterator
from typing import Any

from absl import flags

import train
from skyformer_jax import cli
from skyformer_jax.data.batches import Batch, training_batches
from skyformer_jax.training import loop

_STEP = flags.DEFINE_integer("poisoned_step", None, "Step of the token.", required=True)
_OUTSIDE = 255  # outside the vocabulary of every task on words


def poisoned_batches(
    poisoned_step: int, *arguments: Any, first_step: int, **options: Any
) -> Iterator[Batch]:
    """Yields the batches of training_batches, with the token; takes its arguments as well."""
    batches = training_batches(*arguments, first_step=first_step, **options)
    for step, batch in enumerate(batches, first_step + 1):
        if step == poisoned_step:
            batch.tokens[0, 0] = _OUTSIDE
        yield batch


def main() -> None:
    """Trains as train.py does."""
    loop.training_batches = functools.partial(poisoned_batches, _STEP.value)
    train.main()


if __name__ == "__main__":
    cli.run(main)
