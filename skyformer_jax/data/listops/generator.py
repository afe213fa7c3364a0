"""Generates ListOps: draws trees by the grammar of the benchmark, and evaluates them.

Below max_depth a node is an operator with probability 0.25, else a digit; operators are uniform
over MIN, MAX, MED (median, .5 rounded down) and SM (sum modulo 10), with 2 to 10 arguments,
uniform. Trees whose length (digits, operators and closing brackets) is not strictly between the
bounds are rejected, and duplicates dropped.

Whole chunks of trees grow at once, level by level, in NumPy.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from skyformer_jax.data import parallel
from skyformer_jax.data.listops.symbols import CLOSE, OPERATORS
from skyformer_jax.errors import UserError

_CHUNK = 16_384  # trees drawn at once; another number would change what a seed gives
# generate gives up after this many chunks in a row without a new tree.
_PATIENCE = 20
_OPERATOR_PROBABILITY = 0.25


class Grammar(NamedTuple):
    """How trees grow, and which are kept. The defaults are the benchmark's.

    Attributes:
      min_length: kept trees are longer than this.
      max_length: kept trees are shorter than this.
      max_depth: nodes of this depth are digits; the root has depth 1.
      max_args: largest number of arguments of an operator, at least 2.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10


class _Level(NamedTuple):
    """All nodes of one depth, with the children of each operator next to each other.

    Attributes:
      tree: int [nodes], index of the tree each node belongs to.
      code: int [nodes], 0..9 for a digit, 10..13 for an operator.
      num_args: int [operators], number of children of each operator of this level, in order.
    """

    tree: np.ndarray
    code: np.ndarray
    num_args: np.ndarray


def draw_chunk(grammar: Grammar, seed: int, chunk: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws a fixed number of trees, and returns those that are kept, including duplicates.

    Args:
      grammar: how trees grow, and which are kept.
      seed: seed of the stream of chunks.
      chunk: index in the stream of chunks.

    Returns:
      sequences: list of uint8 arrays of token ids.
      labels: uint8 [kept], the values 0..9.
    """
    levels, kept = _grow(grammar, np.random.default_rng((seed, chunk)))
    levels = _select(levels, kept)
    if not levels[0].tree.size:
        return [], np.zeros(0, np.uint8)
    lengths, values = _evaluate(levels)
    ends = np.cumsum(lengths[0])
    tokens = _write(levels, lengths, ends - lengths[0])
    return np.split(tokens, ends[:-1]), values[0].astype(np.uint8)


def _grow(grammar: Grammar, rng: np.random.Generator) -> tuple[list[_Level], np.ndarray]:
    """Grows _CHUNK trees. A tree that is too long stops growing.

    Returns:
      levels: the nodes of all trees.
      kept: bool [trees], True for the trees whose length the grammar allows.
    """
    length = np.zeros(_CHUNK, np.int64)
    tree = np.arange(_CHUNK, dtype=np.int32)
    levels = []
    for depth in range(1, grammar.max_depth + 1):
        code = rng.integers(0, 10, tree.size, np.int8)
        if depth < grammar.max_depth:
            is_operator = rng.random(tree.size, np.float32) < _OPERATOR_PROBABILITY
            operators = np.flatnonzero(is_operator)
        else:
            operators = np.zeros(0, np.intp)
        code[operators] = 10 + rng.integers(0, len(OPERATORS), operators.size, np.int8)
        length += np.bincount(tree, minlength=_CHUNK)
        length += np.bincount(tree[operators], minlength=_CHUNK)  # closing brackets
        num_args = rng.integers(2, grammar.max_args + 1, operators.size, np.int8)
        num_args[length[tree[operators]] >= grammar.max_length] = 0
        levels.append(_Level(tree, code, num_args))
        tree = np.repeat(tree[operators], num_args)
        if not tree.size:
            break
    return levels, (length > grammar.min_length) & (length < grammar.max_length)


def _select(levels: list[_Level], kept: np.ndarray) -> list[_Level]:
    """Drops from the levels the nodes of the trees where kept, bool [trees], is False."""
    selected = []
    for tree, code, num_args in levels:
        nodes = kept[tree]
        operators = nodes[code >= 10]
        selected.append(_Level(tree[nodes], code[nodes], num_args[operators]))
    return selected


def _first_child(level: _Level) -> np.ndarray:
    """Index, in the next level, of the first child of each operator."""
    num_args = level.num_args.astype(np.int64)
    return np.cumsum(num_args) - num_args


def _evaluate(levels: list[_Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the number of tokens and the value of every node's subtree, level by level."""
    lengths: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for level in reversed(levels):
        operators = np.flatnonzero(level.code >= 10)
        length = np.ones(level.code.size, np.int64)
        value = level.code.astype(np.int64)
        if operators.size:
            first, num_args = _first_child(level), level.num_args.astype(np.int64)
            length[operators] = 2 + np.add.reduceat(lengths[-1], first)
            children = values[-1]
            results = np.stack(
                [
                    np.minimum.reduceat(children, first),
                    np.maximum.reduceat(children, first),
                    _medians(children, first, num_args),
                    np.add.reduceat(children, first) % 10,
                ]
            )
            value[operators] = results[level.code[operators] - 10, np.arange(operators.size)]
        lengths.append(length)
        values.append(value)
    return lengths[::-1], values[::-1]


def _medians(values: np.ndarray, first: np.ndarray, num_args: np.ndarray) -> np.ndarray:
    """Medians, rounded down, of the runs of num_args values that begin at first."""
    slots = np.arange(num_args.max())
    rows = np.minimum(first[:, None] + slots, values.size - 1)
    runs = np.where(slots < num_args[:, None], values[rows], 10)  # 10 sorts after all values
    runs.sort(axis=1)
    run = np.arange(first.size)
    return (runs[run, (num_args - 1) // 2] + runs[run, num_args // 2]) // 2


def _write(levels: list[_Level], lengths: list[np.ndarray], roots: np.ndarray) -> np.ndarray:
    """Returns the token ids of all trees, one after another; roots are where each tree begins."""
    tokens = np.zeros(lengths[0].sum(), np.uint8)
    position = roots
    for depth, level in enumerate(levels):
        tokens[position] = level.code + 1
        operators = np.flatnonzero(level.code >= 10)
        if not operators.size:
            break
        tokens[position[operators] + lengths[depth][operators] - 1] = CLOSE
        below = lengths[depth + 1]
        before = np.cumsum(below) - below
        shift = position[operators] + 1 - before[_first_child(level)]
        position = before + np.repeat(shift, level.num_args)
    return tokens


def generate(
    num_examples: int,
    *,
    seed: int = 0,
    grammar: Grammar | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Generates distinct trees, the same ones for the same seed.

    A smaller num_examples gives the first of the trees that a larger one gives.

    Args:
      num_examples: number of trees.
      seed: seed of the stream of trees.
      grammar: how trees grow, and which are kept; None means the benchmark's.
      progress: called after each chunk with the number of new trees.

    Returns:
      sequences: list of uint8 arrays of token ids (1..15, see SYMBOLS), unpadded.
      labels: uint8 [num_examples], the values 0..9.

    Raises:
      UserError: if max_args or max_depth is too small, or drawing stops giving new trees before
        there are num_examples.
    """
    grammar = grammar or Grammar()
    if grammar.max_args < 2 or grammar.max_depth < 1:
        raise UserError(f"ListOps needs max_args of at least 2 and max_depth of 1; got {grammar}")
    sequences: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[bytes] = set()
    fruitless = 0
    for new_sequences, new_labels in _chunks(grammar, seed):
        before = len(sequences)
        for sequence, label in zip(new_sequences, new_labels, strict=True):
            key = hashlib.blake2b(sequence, digest_size=16).digest()
            if key not in seen and len(sequences) < num_examples:
                seen.add(key)
                sequences.append(sequence)
                labels.append(label)
        if progress is not None:
            progress(len(sequences) - before)
        if len(sequences) == num_examples:
            return sequences, np.array(labels, np.uint8)
        fruitless = fruitless + 1 if len(sequences) == before else 0
        if fruitless == _PATIENCE:
            raise UserError(
                f"found {len(sequences)} distinct ListOps trees of {num_examples} asked for, and "
                f"no more in the last {_PATIENCE * _CHUNK:,} drawn; widen {grammar}"
            )
    raise AssertionError("the stream of chunks has no end")


def _chunks(grammar: Grammar, seed: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yields the chunks in order; threads compute ahead, because NumPy releases the GIL."""
    threads = parallel.num_cores()
    arguments = ((grammar, seed, chunk) for chunk in itertools.count())
    with ThreadPoolExecutor(threads) as pool:
        yield from parallel.in_order(pool, draw_chunk, arguments, ahead=threads)
