"""Examples as arrays in memory, and the order in which training reads them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from skyformer_jax.errors import UserError


class Examples(NamedTuple):
    """A split, or a batch of it, in host memory.

    Attributes:
      tokens: uint8 [examples, max_length], 0 after each sequence's end.
      length: int32 [examples], real tokens of each.
      label: int32 [examples].
    """

    tokens: np.ndarray
    length: np.ndarray
    label: np.ndarray

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples of those rows."""
        return Examples(*(array[rows] for array in self))


def to_arrays(source: Sequence[Mapping], max_length: int) -> Examples:
    """Reads all of a task's split and pads it.

    Args:
      source: has len() and [i] -> {"tokens": integers in 0..255, "label": int}.
      max_length: length to pad to.

    Raises:
      UserError: if there is no example, or one is longer than max_length.
    """
    if not len(source):
        raise UserError("the data set is empty; prepare it again")
    tokens = np.zeros((len(source), max_length), np.uint8)
    length = np.zeros(len(source), np.int32)
    label = np.zeros(len(source), np.int32)
    for i, example in enumerate(source):
        sequence = example["tokens"]
        if len(sequence) > max_length:
            raise UserError(
                f"example {i} has {len(sequence)} tokens, more than model.max_length={max_length}"
            )
        tokens[i, : len(sequence)] = sequence
        length[i], label[i] = len(sequence), example["label"]
    return Examples(tokens, length, label)


def training_rows(
    num_examples: int, batch_size: int, *, seed: int, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Rows of each training batch, without end: every epoch a new seeded permutation.

    Epochs follow each other without a gap, so a batch may hold the end of one and the start of
    the next. The rows of a step depend on the arguments alone, so that an interrupted run reads on
    exactly where it stopped.

    Args:
      num_examples: size of the split.
      batch_size: rows of each batch.
      seed: of the permutations.
      first_step: batches to skip.

    Yields:
      int64 [batch_size].
    """
    position = first_step * batch_size
    epoch, offset = divmod(position, num_examples)
    rest = np.random.default_rng((seed, epoch)).permutation(num_examples)[offset:]
    while True:
        while len(rest) < batch_size:
            epoch += 1
            rest = np.append(rest, np.random.default_rng((seed, epoch)).permutation(num_examples))
        yield rest[:batch_size]
        rest = rest[batch_size:]


def evaluation_rows(num_examples: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of each evaluation batch in order, every example once.

    Yields:
      int64 [batch_size] and how many of them count: the last batch is filled up with row 0.
    """
    for start in range(0, num_examples, batch_size):
        rows = np.arange(start, min(start + batch_size, num_examples))
        yield np.pad(rows, (0, batch_size - len(rows))), len(rows)
