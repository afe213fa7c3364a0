"""The order in which training reads examples, and the padded batches made of them."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError

# Number of batches over which examples are sorted by length. Another number would change the
# batches that a seed gives.
_WINDOW = 64


class Batch(NamedTuple):
    """Examples padded to one length.

    Attributes:
      tokens: uint8 [batch, length], or [batch, 2, length] for pairs of documents: stored values,
        not yet token ids. Values after the end of a document are arbitrary.
      length: int32 [batch], or [batch, 2]: number of real tokens of each document.
      label: int32 [batch].
      positions: int32, of the shape of tokens: the position of each token in its document, where
        values were left out of it; None if they are consecutive. Arbitrary, but in the document's
        padded length, after its end.
    """

    tokens: np.ndarray
    length: np.ndarray
    label: np.ndarray
    positions: np.ndarray | None = None


class BatchShards(NamedTuple):
    """Selects some of the equal shards of each batch, such as those of one process.

    Attributes:
      indices: indices of the shards, ascending.
      num_shards: number of shards of a batch.
    """

    indices: tuple[int, ...] = (0,)
    num_shards: int = 1

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of these shards, given those of a whole batch, int [batch]."""
        return rows.reshape(self.num_shards, -1)[list(self.indices)].ravel()


def make_batch(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    """Makes a batch of some examples, padded to one length.

    Args:
      examples: the split.
      rows: int [batch], indices of the examples.
      length: length to pad to; no document may be longer.
    """
    documents = examples.num_documents
    which = (rows[:, None] * documents + np.arange(documents)).ravel()
    begin, end = examples.starts[which], examples.starts[which + 1]
    shape = (len(rows),) if documents == 1 else (len(rows), documents)

    def padded(values: np.ndarray) -> np.ndarray:
        """Returns the documents' part of values [tokens], as [batch, length] or [batch, 2, ...]."""
        out = np.zeros((len(which), length), values.dtype)
        for row, i, j in zip(out, begin.tolist(), end.tolist(), strict=True):
            row[: j - i] = values[i:j]
        return out.reshape(*shape, length)

    return Batch(
        padded(examples.values),
        (end - begin).astype(np.int32).reshape(shape),
        examples.label[rows],
        None if examples.positions is None else padded(examples.positions),
    )


def padded_length(longest: int, max_length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest of the buckets and max_length into which longest tokens fit.

    Raises:
      UserError: if longest exceeds max_length.
    """
    if longest > max_length:
        raise UserError(
            f"a sequence of {longest} tokens does not fit model.max_length={max_length}"
        )
    return min(size for size in (*buckets, max_length) if size >= longest)


def _epochs(num_examples: int, seed: int, position: int) -> Iterator[np.ndarray]:
    """Yields the permutations of the epochs, one after another, without the first position rows."""
    epoch, offset = divmod(position, num_examples)
    while True:
        yield np.random.default_rng((seed, epoch)).permutation(num_examples)[offset:]
        epoch, offset = epoch + 1, 0


def _spread_classes(labels: np.ndarray) -> np.ndarray:
    """Returns an order that spreads the examples of each class evenly, and keeps theirs."""
    place = np.zeros(len(labels))
    for label in np.unique(labels):
        own = labels == label
        place[own] = (np.arange(own.sum()) + 0.5) / own.sum()
    return np.argsort(place, kind="stable")


def training_rows(
    num_examples: int,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    lengths: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yields the rows of each training batch, endlessly; every epoch is a new seeded permutation.

    Epochs follow each other without a gap, so a batch may hold the end of one and the start of
    the next. The rows of a step depend on the arguments alone, so an interrupted run continues
    exactly where it stopped.

    Args:
      num_examples: number of examples of the split.
      batch_size: number of rows of each batch.
      seed: seed of the permutations.
      first_step: number of batches to skip.
      lengths: int [num_examples], number of tokens of each example. If given, the examples of a
        batch have similar lengths: the examples of every 64 consecutive batches are sorted by
        length, and these batches are shuffled.
      labels: int [num_examples], the class of each example. If given, each batch has every class in
        about the share that it has in the 64 batches: two classes in batches of 16 are 8 and 8, or
        7 and 9, as the 64 batches may not have equal numbers of them.

    Yields:
      int64 [batch_size], indices of examples.
    """
    is_sorted = lengths is not None or labels is not None
    group = _WINDOW if is_sorted else 1
    window, skipped = divmod(first_step, group)
    epochs = _epochs(num_examples, seed, window * group * batch_size)
    rest = np.zeros(0, np.int64)
    while True:
        while len(rest) < group * batch_size:
            rest = np.append(rest, next(epochs))
        rows, rest = rest[: group * batch_size], rest[group * batch_size :]
        if lengths is not None:
            rows = rows[np.argsort(lengths[rows], kind="stable")]
        if labels is not None:
            rows = rows[_spread_classes(labels[rows])]
        batches = rows.reshape(group, batch_size)
        if is_sorted:
            batches = np.random.default_rng((seed, window, 1)).permutation(batches)
        yield from batches[skipped:]
        window, skipped = window + 1, 0


def sampled(batch: Batch, size: int, rng: np.random.Generator) -> Batch:
    """Draws some tokens of each document without replacement; they keep their order and positions.

    Args:
      batch: documents padded to any length.
      size: number of tokens to keep of each document; a shorter one keeps all of its tokens.
      rng: the random numbers.

    Returns:
      A batch with the tokens that were drawn and their positions, padded to size or the length of
      the given batch, whichever is less.
    """
    size = min(size, batch.tokens.shape[-1])
    place = np.arange(batch.tokens.shape[-1], dtype=np.int32)
    order = rng.random(batch.tokens.shape, np.float32)
    order[place >= batch.length[..., None]] = 2  # padding comes last
    kept = np.sort(np.argpartition(order, size - 1, axis=-1)[..., :size], axis=-1)
    positions = np.broadcast_to(place, order.shape) if batch.positions is None else batch.positions
    return Batch(
        np.take_along_axis(batch.tokens, kept, axis=-1),
        np.minimum(batch.length, size),
        batch.label,
        np.take_along_axis(positions, kept, axis=-1),
    )


def training_batches(
    examples: Examples,
    batch_size: int,
    max_length: int,
    *,
    seed: int,
    first_step: int = 0,
    buckets: Sequence[int] = (),
    balanced: bool = False,
    sample_length: int = 0,
    sample_steps: int = 0,
    shards: BatchShards = BatchShards(),  # noqa: B008 (a tuple)
) -> Iterator[Batch]:
    """Yields some shards of each training batch, endlessly, in the order of training_rows.

    Args:
      examples: the whole split; every process has it.
      batch_size: size of a whole batch, a multiple of the number of shards.
      max_length: length to pad to.
      seed: seed of the order.
      first_step: number of batches to skip.
      buckets: lengths below max_length. A batch is padded to the shortest of them that fits, if
        any does, else to max_length.
      balanced: whether each batch has every class in about its share, see training_rows.
      sample_length: number of tokens drawn of each document, see sampled.
      sample_steps: number of first steps that train on drawn tokens; later ones have all tokens.
      shards: which shards of each batch to make, such as those of this process's devices.
    """
    longest = examples.lengths.max(axis=1)
    rows_of_steps = training_rows(
        len(examples),
        batch_size,
        seed=seed,
        first_step=first_step,
        lengths=longest if buckets else None,
        labels=examples.label if balanced else None,
    )
    for step, rows in enumerate(rows_of_steps, first_step):
        length = padded_length(int(longest[rows].max()), max_length, buckets)
        if step >= sample_steps:
            yield make_batch(examples, shards.rows(rows), length)
            continue
        # Drawn for the whole batch, so that the draws do not depend on the shards.
        rng = np.random.default_rng((seed, step, 2))
        batch = sampled(make_batch(examples, rows, length), sample_length, rng)
        here = shards.rows(np.arange(batch_size))
        yield Batch(*(values[here] for values in batch))


class Stage(NamedTuple):
    """Training examples of some of the steps.

    Attributes:
      examples: a whole split.
      end: the number of steps after which the next stage begins; None in the last stage.
    """

    examples: Examples
    end: int | None = None


def checksum_of_stages(stages: Sequence[Stage]) -> str:
    """Returns the checksum of the examples, of all stages if there are several."""
    checksums = [stage.examples.checksum() for stage in stages]
    if len(checksums) == 1:
        return checksums[0]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:16]


def staged_batches(
    stages: Sequence[Stage],
    batch_size: int,
    max_length: int,
    *,
    seed: int,
    first_step: int = 0,
    **options: Any,
) -> Iterator[Batch]:
    """Yields the batches of a curriculum: step i has the i-th batch of its stage's examples.

    Args:
      stages: the stages in their order.
      batch_size: as in training_batches.
      max_length: as in training_batches.
      seed: as in training_batches.
      first_step: number of batches to skip.
      **options: further options of training_batches.
    """
    step = first_step
    for examples, end in stages:
        if end is None or step < end:
            batches = training_batches(
                examples, batch_size, max_length, seed=seed, first_step=step, **options
            )
            yield from itertools.islice(batches, None if end is None else end - step)
            step = end or step


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Stacks batches, one for each seed, into arrays [seeds, batch, ...].

    Shorter ones are padded to the length of the longest, with zeros.
    """
    longest = max(batch.tokens.shape[-1] for batch in batches)

    def padded(x: np.ndarray) -> np.ndarray:
        missing = longest - x.shape[-1]
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x

    tokens, lengths, labels, positions = zip(*batches, strict=True)
    return Batch(
        np.stack([padded(x) for x in tokens]),
        np.stack(lengths),
        np.stack(labels),
        None if positions[0] is None else np.stack([padded(x) for x in positions]),
    )


def evaluation_batches(
    examples: Examples,
    batch_size: int,
    max_length: int,
    *,
    buckets: Sequence[int] = (),
    shards: BatchShards = BatchShards(),  # noqa: B008
) -> Iterator[tuple[np.ndarray, np.ndarray, Batch]]:
    """Yields batches that hold every example once, in order, or by length if there are buckets.

    Args:
      examples: the whole split; every process has it.
      batch_size: size of a whole batch, a multiple of the number of shards.
      max_length: length to pad to.
      buckets: as in training_batches.
      shards: as in training_batches.

    Yields:
      The examples of the whole batch without repetitions, int64 [at most batch_size]; the position
      in the split of each example of the shards, int32; and the examples of the shards. If the last
      whole batch is short, its first example is repeated to fill it.
    """
    longest = examples.lengths.max(axis=1)
    order = np.argsort(longest, kind="stable") if buckets else np.arange(len(examples))
    for start in range(0, len(examples), batch_size):
        rows = order[start : start + batch_size]
        length = padded_length(int(longest[rows].max()), max_length, buckets)
        filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
        positions = shards.rows(filled).astype(np.int32)
        yield rows, positions, make_batch(examples, positions, length)
