"""Reads the files of ListOps as published in the release of the Long Range Arena."""

from pathlib import Path

import numpy as np

from skyformer_jax.data import archives
from skyformer_jax.data.listops.symbols import CLOSE, FIRST_OPERATOR, SYMBOLS, TOKENS
from skyformer_jax.errors import UserError

_FOLDERS = ("listops-1000", "listops")
_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}


def find_files(source: Path) -> dict[str, Path]:
    """Finds the published files of the splits "train", "validation" and "test".

    Args:
      source: the folder of the three files, or one that holds listops-1000/, listops/
        or lra_release/.

    Raises:
      UserError: if one of them is missing.
    """
    return archives.find_files(source, _FOLDERS, _FILES)


def read_tsv(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Reads a published file, basic_{train,val,test}.tsv.

    The file has the columns Source and Target. A source is text such as `( ( ( [MIN 3 ) 4 ) ] )`;
    its parentheses are dropped, because they add nothing to the brackets.

    Args:
      path: the file.

    Returns:
      sequences: list of uint8 arrays of token ids (1..15, see SYMBOLS), unpadded.
      labels: uint8 [examples], the values 0..9.

    Raises:
      UserError: if a line is not a complete expression and a digit, naming file and line.
    """
    sequences, labels = [], []
    try:
        with path.open(encoding="utf-8-sig") as lines:
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
    """Parses a source text to token ids; raises ValueError unless it is a complete expression."""
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
