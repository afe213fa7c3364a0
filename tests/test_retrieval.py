"""AAN pairs in the published format, intact and malformed."""

import tracemalloc

import numpy as np
import pytest

from skyformer_jax.data import retrieval
from skyformer_jax.errors import UserError

NAMES = {"train": "train", "validation": "eval", "test": "test"}


def read(path, size, report=pytest.fail):
    return list(retrieval.read_pairs(path, size, report=report))


def write(path, rows, end=b"\n"):
    path.write_bytes(b"".join(b"\t".join(row) + end for row in rows))
    return path


def random_rows(seed, count):
    """Yields rows whose texts hold any bytes except tabs and line ends."""
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(256), list(b"\t\n\r")).astype(np.uint8)
    for _ in range(count):
        texts = [rng.choice(allowed, rng.integers(1, 300)).tobytes() for _ in range(2)]
        yield [rng.choice([b"0", b"1", b"0.0", b"1.0"]), b"P00-1001", b"P01-1002", *texts]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_reads_the_published_format(tmp_path, end):
    rows = list(random_rows(0, 60))
    path = write(tmp_path / "pairs.tsv", rows, end)
    expected = [(row[3], row[4], int(float(row[0]))) for row in rows]
    assert read(path, 60, report=lambda _: None) == expected
    path.write_bytes(path.read_bytes()[: -len(end)])  # still complete without the final line end
    assert read(path, 60, report=lambda _: None) == expected


def test_quotes_are_only_text_and_what_is_not_utf8_is_counted(tmp_path):
    rows = [
        [b"1", b"a", b"b", b'"a quoted', b'start", and\xc2\x85no end'],
        [b"0", b"a", b"b", b"caf\xe9", b"\xff"],
        [b"0", b"a", b"b", b"text", b"na\xefve"],
    ]
    path = write(tmp_path / "pairs.tsv", rows)
    said = []
    assert [row[:2] for row in read(path, 3, said.append)] == [tuple(row[3:]) for row in rows]
    assert said == [f"{path}: 2 of 3 pairs are not UTF-8; their bytes are kept"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1\ta\tb\tone text", "expected 5 columns, got 4; is the file complete"),
        (b"1\ta\tb\tone\ttwo\tthree", "expected 5 columns, got 6"),
        (b"", "expected 5 columns, got 1"),
        (b"2\ta\tb\tone\ttwo", "the label '2' is not 0 or 1"),
        (b"-1\ta\tb\tone\ttwo", "the label '-1' is not"),
        (b"0.5\ta\tb\tone\ttwo", "the label '0.5' is not"),
        (b"1e0\ta\tb\tone\ttwo", "the label '1e0' is not"),
        (b" 1\ta\tb\tone\ttwo", "the label ' 1' is not"),
        (b"\ta\tb\tone\ttwo", "the label '' is not"),
        (b"label\tid1\tid2\ttext1\ttext2", "the label 'label' is not"),
        (b"1" * 5000 + b"\ta\tb\tone\ttwo", f"the label '{'1' * 20}' is not"),
        (b"1\ta\tb\t\ttwo", "a text is empty"),
        (b"1\ta\tb\tone\t", "a text is empty"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    path = tmp_path / "new_aan_pairs.eval.tsv"
    path.write_bytes(b"1\ta\tb\tone\ttwo\n0\ta\tb\tone\ttwo\n" + row + b"\n")
    pairs = retrieval.read_pairs(path, 3, report=pytest.fail)
    assert [next(pairs)[2], next(pairs)[2]] == [1, 0]
    with pytest.raises(UserError, match=rf"{path}:3: {message}"):
        next(pairs)


def test_another_number_of_pairs_is_said(tmp_path):
    path = write(tmp_path / "new_aan_pairs.train.tsv", random_rows(1, 30))
    pairs = retrieval.read_pairs(path, retrieval.SIZES["train"], report=pytest.fail)
    with pytest.raises(UserError, match=rf"{path} is incomplete: 30 of 147,086 pairs; .*download"):
        list(pairs)
    with pytest.raises(UserError, match=r"not as published: 30 of 29 pairs"):
        read(path, 29)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"incomplete: 0 of 30 pairs"):
        read(path, 30)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "pairs.tsv", random_rows(2, 4))
    content = path.read_bytes()
    last_text = content.rindex(b"\t") + 2
    for cut in range(0, last_text, 5):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"pairs.tsv(:\d: | is incomplete: )"):
            read(path, 4, report=lambda _: None)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    with path.open("wb") as file:
        for i in range(500):
            file.write(b"%d\ta\tb\t%s\t%s\n" % (i % 2, b"x" * 8000, b"y" * 12_000))
    size = path.stat().st_size
    assert size > 10_000_000
    tracemalloc.start()
    try:
        assert sum(label for _, _, label in retrieval.read_pairs(path, 500, report=print)) == 250
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 50


@pytest.mark.parametrize(
    "place", ["", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"]
)
def test_finds_the_files_of_the_release(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES.values():
        (folder / f"new_aan_pairs.{name}.tsv").touch()
    assert retrieval.find_files(tmp_path) == {
        split: folder / f"new_aan_pairs.{name}.tsv" for split, name in NAMES.items()
    }
    (folder / "new_aan_pairs.eval.tsv").unlink()
    with pytest.raises(UserError, match=r"does not hold .*new_aan_pairs.eval.tsv, .*lra_release"):
        retrieval.find_files(tmp_path)
