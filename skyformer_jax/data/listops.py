"""ListOps: nested operations on digits (Nangia and Bowman, 2018, arXiv 1804.06028).

The generator follows the grammar of the Long Range Arena (Tay et al., 2020, arXiv 2011.04006):
below max_depth a node is an operator with probability 0.25, else a digit; operators are uniform
over MIN, MAX, MED (median, .5 rounded down) and SM (sum modulo 10), with 2 to 10 arguments,
uniform. Trees whose length (digits, operators and closing brackets) is not strictly between the
bounds are rejected, and duplicates dropped.

Whole chunks of trees grow together, level by level, in NumPy.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from skyformer_jax.data import archives, parallel
from skyformer_jax.errors import UserError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*"0123456789", *OPERATORS, "]")
TOKENS = {symbol: i + 1 for i, symbol in enumerate(SYMBOLS)}  # 0 pads
VOCAB_SIZE = len(SYMBOLS) + 1
FIRST_OPERATOR, CLOSE = TOKENS["[MIN"], TOKENS["]"]

_CHUNK = 16_384  # roots drawn together; part of what a seed means
_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
# Chunks in a row without a new tree, after which there are taken to be no more.
_PATIENCE = 20


class Grammar(NamedTuple):
    """What trees are kept, and how they grow. The defaults are the benchmark's.

    Attributes:
      min_length: kept trees are longer than this.
      max_length: and shorter than this.
      max_depth: nodes of this depth are digits; the root has depth 1.
      max_args: of an operator; at least 2.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10


_OPERATOR_PROBABILITY = 0.25


class _Level(NamedTuple):
    """All nodes of one depth, the children of each operator side by side.

    Attributes:
      tree: index of the tree each node belongs to.
      code: its value 0..9, or 10..13 for an operator.
      num_args: children of each operator of the level, in order.
    """

    tree: np.ndarray
    code: np.ndarray
    num_args: np.ndarray


def draw_chunk(grammar: Grammar, seed: int, chunk: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws a fixed number of trees and returns those that are kept, duplicates included.

    Args:
      grammar: what to draw.
      seed: of the data set.
      chunk: index in the stream of chunks.

    Returns:
      Sequences (uint8 token ids) and labels (uint8, 0..9) of the kept among _CHUNK trees.
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
    """Grows _CHUNK trees; a tree that is too long already is not grown on."""
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
    """The levels without the nodes of trees that are not kept."""
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
    """Length of the text and value of every node's subtree, from the leaves up."""
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
    """Median, rounded down, of each run of values."""
    slots = np.arange(num_args.max())
    rows = np.minimum(first[:, None] + slots, values.size - 1)
    table = np.where(slots < num_args[:, None], values[rows], 10)  # what is no value sorts last
    table.sort(axis=1)
    run = np.arange(first.size)
    return (table[run, (num_args - 1) // 2] + table[run, num_args // 2]) // 2


def _write(levels: list[_Level], lengths: list[np.ndarray], roots: np.ndarray) -> np.ndarray:
    """The trees as text, one after another; roots are the places of their first tokens."""
    tokens = np.zeros(lengths[0].sum(), np.uint8)
    place = roots
    for depth, level in enumerate(levels):
        tokens[place] = level.code + 1
        operators = np.flatnonzero(level.code >= 10)
        if not operators.size:
            break
        tokens[place[operators] + lengths[depth][operators] - 1] = CLOSE
        below = lengths[depth + 1]
        before = np.cumsum(below) - below
        shift = place[operators] + 1 - before[_first_child(level)]
        place = before + np.repeat(shift, level.num_args)
    return tokens


def generate(
    num_examples: int,
    *,
    seed: int = 0,
    grammar: Grammar | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Distinct trees, the same for the same seed; fewer are the first of more.

    Args:
      num_examples: how many.
      seed: of the stream of trees.
      grammar: None means the benchmark's.
      progress: called with the number of new trees, as they come.

    Returns:
      sequences: list of uint8 arrays of token ids (1..15, see SYMBOLS), unpadded.
      labels: uint8 [num_examples], the values 0..9.

    Raises:
      UserError: if the grammar's bounds exclude each other, or hold fewer distinct trees.
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
    """The stream of chunks in order, made by threads (NumPy lets go of the lock) a bit ahead."""
    threads = parallel.num_cores()
    arguments = ((grammar, seed, chunk) for chunk in itertools.count())
    with ThreadPoolExecutor(threads) as pool:
        yield from parallel.in_order(pool, draw_chunk, arguments, ahead=threads)


def find_files(source: Path) -> dict[str, Path]:
    """The published files of the splits "train", "validation" and "test".

    Args:
      source: the folder with the three files, or one with listops-1000/, or with lra_release/.

    Raises:
      UserError: if they are not all there.
    """
    return archives.find_files(source, "listops-1000", _FILES)


def read_tsv(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Reads a published file, basic_{train,val,test}.tsv.

    Its header is Source, Target; a source is text such as `( ( ( [MIN 3 ) 4 ) ] )`, whose
    parentheses say nothing that the brackets do not, and are dropped.

    Args:
      path: of the file.

    Returns:
      As generate.

    Raises:
      UserError: naming file and line, for anything that is not a complete expression and a digit.
    """
    sequences, labels = [], []
    try:
        with path.open(encoding="utf-8") as lines:
            if next(lines, "").rstrip("\r\n").split("\t") != ["Source", "Target"]:
                raise UserError(f"{path}:1: expected the header Source<tab>Target")
            for number, line in enumerate(lines, start=2):
                try:
                    columns = line.rstrip("\r\n").split("\t")
                    if len(columns) != 2:
                        raise ValueError(f"expected 2 columns, got {len(columns)}")
                    source, target = columns
                    if target not in SYMBOLS[:10]:
                        raise ValueError(f"the label {target!r} is not a digit")
                    sequences.append(_parse(source))
                    labels.append(int(target))
                except KeyError as error:
                    raise UserError(f"{path}:{number}: unknown symbol {error}") from None
                except ValueError as error:
                    raise UserError(f"{path}:{number}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{len(labels) + 2} or after: not UTF-8 text: {error}") from None
    if not labels:
        raise UserError(f"{path}: no examples after the header")
    return sequences, np.array(labels, np.uint8)


def _parse(source: str) -> np.ndarray:
    """Token ids of a source text; ValueError unless it is one complete expression."""
    symbols = source.replace("(", " ").replace(")", " ").split()
    tokens = np.array([TOKENS[symbol] for symbol in symbols], np.uint8)
    if not tokens.size:
        raise ValueError("the expression is empty")
    is_operator = (tokens >= FIRST_OPERATOR) & (tokens < CLOSE)
    depth = np.cumsum(is_operator.astype(np.int64) - (tokens == CLOSE))
    if depth[-1] != 0 or depth.min() < 0:
        raise ValueError("the brackets do not match; is the line complete?")
    if not depth[:-1].all():
        raise ValueError("more than one expression")
    if (is_operator[:-1] & (tokens[1:] == CLOSE)).any():
        raise ValueError("an operator without arguments")
    return tokens


def root_operator_floor(first_tokens: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the Bayes classifier that sees the root alone, at its best on this very set.

    Args:
      first_tokens: int [examples], the first token of each sequence: the root operator.
      labels: int [examples].

    Returns:
      In 0..1: that of answering, for each root operator, the commonest label under it.
    """
    table = np.zeros((VOCAB_SIZE, 10), int)
    np.add.at(table, (first_tokens, labels), 1)
    return float(table.max(axis=1).sum() / len(labels))
