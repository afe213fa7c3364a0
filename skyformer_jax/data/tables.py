"""Reads examples from tables, one for each split: TSV, CSV, Parquet, or NumPy arrays (.npz).

A TSV file has columns that are separated by tabs, without quoting; a CSV file is quoted as in
RFC 4180. Both begin with a line of column names. A byte-order mark before that line is ignored, and
so are empty lines.
"""

import contextlib
import csv
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from skyformer_jax.data import archives
from skyformer_jax.errors import UserError

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}

Column = Sequence | np.ndarray


def find(folder: Path) -> dict[str, list[Path]]:
    """Finds the files of each split in a folder: train.tsv or train-00000-of-00002.parquet.

    Raises:
      UserError: if the folder holds a split twice, in two formats or under two names, or if a part
        is missing.
    """
    splits = {}
    for split, names in SPLIT_NAMES.items():
        found = {}
        for name in names:
            for ending in READERS:
                files = _parts(folder, name, ending)
                whole = folder / f"{name}{ending}"
                if whole.is_file():
                    found[whole] = [whole]
                if files:
                    found[files[0]] = files
        if len(found) > 1:
            raise UserError(
                f"{folder} holds {split} {len(found)} times: "
                f"{' and '.join(path.name for path in found)}; leave one there"
            )
        for files in found.values():
            splits[split] = files
    return splits


def _parts(folder: Path, name: str, ending: str) -> list[Path]:
    """Finds NAME-00000-of-00002.parquet and so on, in order; raises UserError if one is missing."""
    pattern = re.compile(rf"{name}-(\d+)-of-(\d+)(-[0-9a-f]+)?{re.escape(ending)}")
    found = [
        (int(match[1]), int(match[2]), path)
        for path in sorted(folder.glob(f"{name}-*-of-*{ending}"))
        if (match := pattern.fullmatch(path.name))
    ]
    numbers, totals = [number for number, _, _ in found], {total for _, total, _ in found}
    whole = [list(range(first, first + len(found))) for first in (0, 1)]
    if found and (totals != {len(found)} or numbers not in whole):
        raise UserError(
            f"{folder} holds {name} in parts that are not whole: {len(found)} of "
            f"{' or '.join(map(str, sorted(totals)))}, {', '.join(p.name for _, _, p in found[:5])}"
            f"{', ...' if len(found) > 5 else ''}; put all the parts of one copy there"
        )
    return [path for _, _, path in found]


def read(paths: Sequence[Path], columns: Sequence[Sequence[str]]) -> list[Column]:
    """Reads columns of a table, which may be split into several files.

    Args:
      paths: the files of the table, in order.
      columns: for each wanted column, the names that it may have.

    Returns:
      The values of each wanted column: bytes from TSV, str from CSV, and the stored values from
      Parquet and .npz.

    Raises:
      UserError: if a file is malformed, has no examples, or lacks a column. The message names the
        file, and the line if a line of a text file is malformed.
    """
    parts = [_read_file(path, columns) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return [[value for part in column for value in part] for column in zip(*parts, strict=True)]


def as_bytes(value: object) -> bytes | None:
    """Returns a text as bytes, including those that are not UTF-8; None if it is not a text."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return bytes(value) if isinstance(value, bytes) else None


def class_numbers(place: Path, labels: Column, numbers: Mapping[str, int]) -> np.ndarray:
    """Returns the class numbers of examples, int64 [examples].

    Args:
      place: the file or folder, for errors.
      labels: the label of each example, a string, bytes or a number.
      numbers: the class number of each label; the keys are the labels as strings.

    Raises:
      UserError: if a label is not a key of numbers. The message names the first such example.
    """
    found = np.zeros(len(labels), np.int64)
    for i, label in enumerate(labels):
        text = label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
        if text not in numbers:
            allowed = ", ".join([*numbers][:20]) + (", ..." if len(numbers) > 20 else "")
            raise UserError(
                f"{place}, example {i + 1}: the label {text[:40]!r} is not one of: {allowed}"
            )
        found[i] = numbers[text]
    return found


def has_columns(paths: Sequence[Path], columns: Sequence[Sequence[str]]) -> bool:
    """Returns True if every table has all wanted columns, under any of their names; see read."""
    return all(not set(names).isdisjoint(_names(path)) for path in paths for names in columns)


def _names(path: Path) -> Sequence[str]:
    """Reads the names of a table's columns."""
    if path.suffix == ".parquet":
        with _unreadable(path):
            return pyarrow.parquet.read_schema(path).names
    if path.suffix == ".npz":
        with _open_npz(path) as arrays:
            return arrays.files
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        return next(lines, "").rstrip("\r\n").split("," if path.suffix == ".csv" else "\t")


_UNREADABLE = (
    *(EOFError, OSError, ValueError, AttributeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, pyarrow.ArrowException),
)


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Turns what libraries raise for a truncated file or another format into a UserError."""
    try:
        yield
    except _UNREADABLE as e:
        if isinstance(e, OSError) and e.errno:  # a failure of the machine
            raise
        form = "arrays of numpy.savez" if path.suffix == ".npz" else "Parquet"
        raise UserError(f"{path} cannot be read as {form}: {' '.join(str(e).split())}") from None


def _read_file(path: Path, columns: Sequence[Sequence[str]]) -> list[Column]:
    archives.check_readable(path)
    table = READERS[path.suffix](path)
    chosen = []
    for names in columns:
        there = [name for name in names if name in table]
        if len(there) != 1:
            raise UserError(
                f"{path} has {len(there) or 'no'} columns named {' or '.join(names)}; its columns "
                f"are: {', '.join(map(repr, table))[:200]}"
            )
        chosen.append(table[there[0]])
    lengths = {len(column) for column in chosen}
    if lengths == {0}:
        raise UserError(f"{path} holds no examples")
    if len(lengths) > 1:
        raise UserError(f"the columns of {path} have different lengths: {sorted(lengths)}")
    return chosen


def _read_csv(path: Path) -> dict[str, Column]:
    csv.field_size_limit(sys.maxsize)  # for the whole module; the default is 128 KiB
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        try:
            names = next(rows, [])
            values = []
            for row in rows:
                if row:
                    _check_count(path, rows.line_num, row, names)
                    values.append(row)
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: {error}") from None
    return _columns(path, names, values)


def _read_tsv(path: Path) -> dict[str, Column]:
    names, values = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if number == 1:
                row[0] = row[0].removeprefix(archives.BYTE_ORDER_MARK)
                names = [name.decode("utf-8", "replace") for name in row]
            elif row != [b""]:
                _check_count(path, number, row, names)
                values.append(row)
    return _columns(path, names, values)


def _check_count(path: Path, line: int, row: Sequence, names: Sequence[str]) -> None:
    if len(row) != len(names):
        raise UserError(
            f"{path}:{line}: {len(row)} columns; the first line names {len(names)}: "
            f"{', '.join(map(repr, names))[:200]}"
        )


def _columns(path: Path, names: Sequence[str], values: Sequence[Sequence]) -> dict[str, Column]:
    if len(set(names)) != len(names):
        raise UserError(f"{path}:1: two columns have the same name: {', '.join(map(repr, names))}")
    return dict(zip(names, zip(*values, strict=True) if values else [()] * len(names), strict=True))


def _read_parquet(path: Path) -> dict[str, Column]:
    with _unreadable(path):
        table = pyarrow.parquet.read_table(path)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _read_npz(path: Path) -> dict[str, Column]:
    with _open_npz(path) as arrays:
        return {name: np.atleast_1d(arrays[name]) for name in arrays.files}


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    with _unreadable(path):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is one array, of numpy.save, and has no names")
        with arrays:
            yield arrays


READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}
