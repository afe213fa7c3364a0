"""The tasks of ListOps."""

import dataclasses

import numpy as np

from skyformer_jax.data.examples import Examples
from skyformer_jax.data.listops.builder import Listops
from skyformer_jax.data.listops.symbols import CLOSE, VOCAB_SIZE
from skyformer_jax.data.task import LoadStored, Task
from skyformer_jax.data.tokenizer import Tokenizer


def root_operator_floor(first_tokens: np.ndarray, labels: np.ndarray) -> float:
    """Computes the accuracy of the best classifier of these examples that sees only root operators.

    Args:
      first_tokens: int [examples], the first token of each sequence, which is its root operator.
      labels: int [examples].

    Returns:
      Accuracy, in 0..1, of answering the commonest label of each root operator.
    """
    counts = np.zeros((VOCAB_SIZE, 10), int)
    np.add.at(counts, (first_tokens, labels), 1)
    return float(counts.max(axis=1).sum() / len(labels))


def _make_split(load: LoadStored, split: str, brackets: bool) -> Examples:
    """Returns a split with the closing brackets, or without, as the published code reads it."""
    examples = load(split)
    return examples if brackets else examples.select(examples.values != CLOSE)


def _extra_floors(examples: Examples) -> dict[str, float]:
    first_tokens = examples.values[examples.starts[:-1]]
    return {"root operator": root_operator_floor(first_tokens, examples.label)}


LISTOPS = Task(
    name="listops",
    builder=Listops,
    config="generated",
    source_config="official",
    max_length=2_000,
    tokenizer=Tokenizer(VOCAB_SIZE),
    options={"brackets": True},
    make_split=_make_split,
    extra_floors=_extra_floors,
)
LISTOPS_SMALL = dataclasses.replace(
    LISTOPS, name="listops_small", config="small", source_config=None, max_length=48
)
