"""train.py with one token outside of the vocabulary, of which the model makes NaN.

    python -m experiments.faults.poisoned --poisoned_step=50 --config=configs/quickstart.py ...

A fault for the soak to make; the token is in the first example of that step's batch.
"""

import functools
from collections.abc import Iterator
from typing import Any

from absl import flags

import train
from skyformer_jax import cli
from skyformer_jax.data.batches import Batch, training_batches
from skyformer_jax.training import loop

_STEP = flags.DEFINE_integer("poisoned_step", None, "Which.", required=True)
_OUTSIDE = 255  # of the vocabulary of every task on words


def poisoned_batches(
    poisoned_step: int, *arguments: Any, first_step: int, **options: Any
) -> Iterator[Batch]:
    """The batches of training_batches, but for the token; the other arguments are its own."""
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
