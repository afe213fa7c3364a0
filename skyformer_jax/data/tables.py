"""Reads examples from tables, one file a split: TSV, CSV, Parquet, or arrays of NumPy.

A TSV file is lines of columns between tabs, without quoting; a CSV file is quoted as RFC 4180 says.
Both begin with the names of the columns, and a byte-order mark before these is no part of them.
"""

import csv
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from skyformer_jax.errors import UserError

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

Column = Sequence | np.ndarray


def find(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that a folder holds, as train.tsv or train-00000-of-00002.parquet.

    Raises:
      UserError: if a split is there twice, in two forms or under two names.
    """
    splits = {}
    for split, names in SPLIT_NAMES.items():
        found = {}
        for name in names:
            for ending in READERS:
                files = sorted(folder.glob(f"{name}-*-of-*{ending}"))
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


def read(paths: Sequence[Path], columns: Sequence[Sequence[str]]) -> list[Column]:
    """Columns of a table, or of several that follow one another.

    Args:
      paths: the files.
      columns: the names that each wanted column may have.

    Returns:
      For each wanted column its values: str or bytes from TSV and CSV, and what is stored in
      others.

    Raises:
      UserError: naming the file, and the line if it has lines, if it is malformed, has no examples,
        or lacks a column.
    """
    parts = [_read_file(path, columns) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return [[value for part in column for value in part] for column in zip(*parts, strict=True)]


def as_bytes(value: object) -> bytes | None:
    """A text as bytes, those that are not UTF-8 included; None if it is no text."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return bytes(value) if isinstance(value, bytes) else None


def _read_file(path: Path, columns: Sequence[Sequence[str]]) -> list[Column]:
    table = READERS[path.suffix](path)
    chosen = []
    for names in columns:
        there = [name for name in names if name in table]
        if len(there) != 1:
            raise UserError(
                f"{path} has {len(there) or 'no'} columns named {' or '.join(names)}; its columns "
                f"are: {', '.join(map(repr, table))}"
            )
        chosen.append(table[there[0]])
    lengths = {len(column) for column in chosen}
    if lengths == {0}:
        raise UserError(f"{path} holds no examples")
    if len(lengths) > 1:
        raise UserError(f"the columns of {path} have different lengths: {sorted(lengths)}")
    return chosen


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        encoding = _MARKS.get(file.read(2))
    if encoding:
        raise UserError(f"{path} is {encoding} text; save it as UTF-8")


def _read_csv(path: Path) -> dict[str, Column]:
    _check_encoding(path)
    csv.field_size_limit(sys.maxsize)  # of the module, whose default is 128 KiB
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
    _check_encoding(path)
    names, values = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if number == 1:
                row[0] = row[0].removeprefix(b"\xef\xbb\xbf")
                names = [name.decode("utf-8", "replace") for name in row]
                continue
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
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} cannot be read as Parquet: {' '.join(str(error).split())}"
        ) from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _read_npz(path: Path) -> dict[str, Column]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as arrays of numpy.savez ({' '.join(str(error).split())}); "
            "arrays of objects are not read"
        ) from None


READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}
