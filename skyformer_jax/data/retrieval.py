"""Retrieval: does one paper cite the other? AAN pairs (Radev et al., 2013; Tay et al., 2020).

The Long Range Arena's files new_aan_pairs.{train,eval,test}.tsv: a line is label, two ids and two
texts, separated by tabs, with neither header nor quoting. They hold gigabytes, so they are read as
a stream. Texts are bytes, as the models read them; nothing is decoded.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from skyformer_jax.data import archives
from skyformer_jax.data.text import is_utf8
from skyformer_jax.errors import UserError

SIZES: Mapping[str, int] = {"train": 147_086, "validation": 18_090, "test": 17_437}

_FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
_LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}
_NUM_COLUMNS = 5


def find_files(source: Path) -> dict[str, Path]:
    """The files of the splits "train", "validation" and "test".

    Args:
      source: the folder with the three files, or one with tsv_data/, or with lra_release/.

    Raises:
      UserError: if they are not all there.
    """
    return archives.find_files(source, "tsv_data", _FILES)


def read_pairs(
    path: Path, size: int, *, report: Callable[[str], None]
) -> Iterator[tuple[bytes, bytes, int]]:
    """Reads a file line by line, in memory that does not grow with it.

    Args:
      path: of a file.
      size: its number of pairs.
      report: told, in a line at the end, of pairs that are not UTF-8.

    Yields:
      First text, second text, and label: 1 if one paper cites the other, else 0.

    Raises:
      UserError: naming file and line, for another number of columns, another label or a text that
        is empty; and at the end, for another number of pairs.
    """
    count = foreign = 0
    with path.open("rb") as lines:
        for count, line in enumerate(lines, start=1):
            columns = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if len(columns) != _NUM_COLUMNS:
                raise UserError(
                    f"{path}:{count}: expected {_NUM_COLUMNS} columns, got {len(columns)}; "
                    "is the file complete?"
                )
            label, _, _, first, second = columns
            if label not in _LABELS:
                raise UserError(f"{path}:{count}: the label {_shown(label)} is not 0 or 1")
            if not first or not second:
                raise UserError(f"{path}:{count}: a text is empty; is the file complete?")
            foreign += not (is_utf8(first) and is_utf8(second))
            yield first, second, _LABELS[label]
    archives.check_count(path, count, size, "pairs")
    if foreign:
        report(f"{path}: {foreign:,} of {count:,} pairs are not UTF-8; their bytes are kept")


def _shown(label: bytes) -> str:
    """The start of what is no label, such as a whole text."""
    return repr(label[:20])[1:]
