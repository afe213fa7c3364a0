"""Examples in memory, the order in which training reads them, and the batches made of them.

A split lies unpadded in one array of bytes; a batch is padded on the way to the devices.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from skyformer_jax.errors import UserError

# Batches whose examples are sorted by length together; part of what a seed means.
_WINDOW = 64


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """A split in host memory: [i] -> {"tokens": int array, unpadded, "label": int}.

    Where an example is a pair of documents, its tokens are a tuple of two arrays.

    Attributes:
      values: uint8, the documents one after another; a token's id is its value + shift.
      starts: int64 [examples * num_documents + 1], where each document begins, and the end.
      label: int32 [examples].
      num_documents: of each example, 1 or 2.
      shift: 0, or 1 where 0 pads and the values are bytes.
    """

    values: np.ndarray
    starts: np.ndarray
    label: np.ndarray
    num_documents: int = 1
    shift: int = 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.label)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """An example, as the class says."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        first = i % len(self) * self.num_documents
        documents = tuple(
            self.values[self.starts[j] : self.starts[j + 1]].astype(np.int16) + self.shift
            for j in range(first, first + self.num_documents)
        )
        return {
            "tokens": documents if self.num_documents > 1 else documents[0],
            "label": int(self.label[i]),
        }

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples, num_documents]: tokens of each document."""
        return np.diff(self.starts).reshape(-1, self.num_documents)

    def select(self, keep: np.ndarray) -> "Examples":
        """Without the values where keep, bool and as long as values, is False."""
        before = np.concatenate([[0], np.cumsum(keep)])
        return dataclasses.replace(self, values=self.values[keep], starts=before[self.starts])

    def cut(self, length: int) -> "Examples":
        """The first length tokens of each document."""
        lengths = np.diff(self.starts)
        if not len(lengths) or lengths.max() <= length:
            return self
        place = np.arange(len(self.values)) - np.repeat(self.starts[:-1], lengths)
        return self.select(place < length)

    def shrunk(self, factor: int) -> "Examples":
        """Square images, row by row, at a resolution that is factor times lower.

        Every pixel is the mean of factor x factor of them, rounded.

        Raises:
          UserError: if the factor does not divide the images' sides.
        """
        if factor == 1:
            return self
        side = math.isqrt(int(self.starts[1]))
        if factor < 1 or side % factor:
            raise UserError(f"data.shrink must divide {side}, the images' side; got {factor}")
        small = side // factor
        values = np.empty((len(self), small, small), np.uint8)
        images = self.values.reshape(-1, small, factor, small, factor)
        for start in range(0, len(self), 4096):  # the means are floats, eight times as large
            block = slice(start, start + 4096)
            values[block] = np.rint(images[block].mean(axis=(2, 4)))
        starts = np.arange(len(self) + 1, dtype=np.int64) * small**2
        return dataclasses.replace(self, values=values.ravel(), starts=starts)

    def followed_by(self, other: "Examples") -> "Examples":
        """These and then the other's, of the same kind."""
        return dataclasses.replace(
            self,
            values=np.concatenate([self.values, other.values]),
            starts=np.concatenate([self.starts, self.starts[-1] + other.starts[1:]]),
            label=np.concatenate([self.label, other.label]),
        )

    def checksum(self) -> str:
        """16 hexadecimal digits that depend on every token, every label and their order."""
        sha = hashlib.sha256()
        for array in (self.values, self.starts.astype("<i8"), self.label.astype("<i4")):
            sha.update(np.ascontiguousarray(array))
        return sha.hexdigest()[:16]


class Batch(NamedTuple):
    """Examples padded to one length.

    Attributes:
      tokens: uint8 [batch, length], or [batch, 2, length] for pairs of documents: values, of which
        those after a document's end mean nothing.
      length: int32 [batch], or [batch, 2]: real tokens of each document.
      label: int32 [batch].
    """

    tokens: np.ndarray
    length: np.ndarray
    label: np.ndarray


class Part(NamedTuple):
    """Some of the equal parts in which each batch is divided.

    Attributes:
      indices: which, ascending.
      count: how many there are altogether.
    """

    indices: tuple[int, ...] = (0,)
    count: int = 1

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows of a batch, int [batch], that belong to these parts."""
        return rows.reshape(self.count, -1)[list(self.indices)].ravel()


def make_batch(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    """Pads the examples of those rows.

    Args:
      examples: the split.
      rows: int [batch].
      length: to pad to, at least that of the longest.
    """
    documents = examples.num_documents
    which = (rows[:, None] * documents + np.arange(documents)).ravel()
    begin, end = examples.starts[which], examples.starts[which + 1]
    tokens = np.zeros((len(which), length), np.uint8)
    values = examples.values
    for row, i, j in zip(tokens, begin.tolist(), end.tolist(), strict=True):
        row[: j - i] = values[i:j]
    lengths = (end - begin).astype(np.int32)
    if documents > 1:
        tokens = tokens.reshape(-1, documents, length)
        lengths = lengths.reshape(-1, documents)
    return Batch(tokens, lengths, examples.label[rows])


def padded_length(longest: int, max_length: int, buckets: Sequence[int]) -> int:
    """The smallest of the buckets and max_length that holds the longest.

    Raises:
      UserError: if max_length does not.
    """
    if longest > max_length:
        raise UserError(
            f"a sequence of {longest} tokens does not fit model.max_length={max_length}"
        )
    return min(size for size in (*buckets, max_length) if size >= longest)


def _stream(num_examples: int, seed: int, position: int) -> Iterator[np.ndarray]:
    """Permutations of the epochs from a position in the stream of all on."""
    epoch, offset = divmod(position, num_examples)
    while True:
        yield np.random.default_rng((seed, epoch)).permutation(num_examples)[offset:]
        epoch, offset = epoch + 1, 0


def training_rows(
    num_examples: int,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    lengths: np.ndarray | None = None,
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
      lengths: int [num_examples]; if given, batches are of examples of like length: of every 64
        batches in a row the examples are sorted by it, and the batches put in random order.

    Yields:
      int64 [batch_size].
    """
    group = 1 if lengths is None else _WINDOW
    window, skipped = divmod(first_step, group)
    epochs = _stream(num_examples, seed, window * group * batch_size)
    rest = np.zeros(0, np.int64)
    while True:
        while len(rest) < group * batch_size:
            rest = np.append(rest, next(epochs))
        rows, rest = rest[: group * batch_size], rest[group * batch_size :]
        if lengths is not None:
            rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches = rows.reshape(group, batch_size)
        if lengths is not None:
            batches = np.random.default_rng((seed, window, 1)).permutation(batches)
        yield from batches[skipped:]
        window, skipped = window + 1, 0


def training_batches(
    examples: Examples,
    batch_size: int,
    max_length: int,
    *,
    seed: int,
    first_step: int = 0,
    buckets: Sequence[int] = (),
    part: Part = Part(),  # noqa: B008 (a tuple)
) -> Iterator[Batch]:
    """A part of each training batch, without end; see training_rows.

    Args:
      examples: the whole split, in every process.
      batch_size: of all parts together; a multiple of their number.
      max_length: length to pad to.
      seed: of the order.
      first_step: batches to skip.
      buckets: lengths below max_length to which batches of short examples are padded instead; ()
        pads all to max_length.
      part: which examples of each batch to make: those of this process's devices.
    """
    longest = examples.lengths.max(axis=1)
    rows_of_steps = training_rows(
        len(examples),
        batch_size,
        seed=seed,
        first_step=first_step,
        lengths=longest if buckets else None,
    )
    for rows in rows_of_steps:
        length = padded_length(int(longest[rows].max()), max_length, buckets)
        yield make_batch(examples, part.of(rows), length)


def stacked(streams: Sequence[Iterator[Any]], num_steps: int) -> Any:
    """The next batches of every stream, of one length, as arrays [num_steps, streams, batch, ...].

    Args:
      streams: of training_batches or of training_rows, one for each seed.
      num_steps: batches to take of each.
    """
    batches = [next(stream) for _ in range(num_steps) for stream in streams]

    def stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(arrays).reshape(num_steps, len(streams), *arrays[0].shape)

    if isinstance(batches[0], Batch):
        return Batch(*map(stack, zip(*batches, strict=True)))
    return stack(batches).astype(np.int32)


def evaluation_batches(
    examples: Examples,
    batch_size: int,
    max_length: int,
    *,
    buckets: Sequence[int] = (),
    part: Part = Part(),  # noqa: B008
) -> Iterator[tuple[np.ndarray, np.ndarray, Batch]]:
    """Batches that hold every example once; in order, or by length where there are buckets.

    Yields:
      rows: int64 [at most batch_size], which examples the first of the batch are.
      places: int32 [part of batch_size], which examples those of the part are.
      batch: the part of batch_size examples: the last batch is filled up with its first one.
    """
    longest = examples.lengths.max(axis=1)
    order = np.argsort(longest, kind="stable") if buckets else np.arange(len(examples))
    for start in range(0, len(examples), batch_size):
        rows = order[start : start + batch_size]
        length = padded_length(int(longest[rows].max()), max_length, buckets)
        filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
        places = part.of(filled).astype(np.int32)
        yield rows, places, make_batch(examples, places, length)
