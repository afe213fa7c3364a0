"""The command that prepares a data set, run as a user runs it."""

import re
import subprocess
import sys

import pytest

from skyformer_jax.data import prepare

TREES = ["[MAX 1 2 ]\t2", "[MIN 3 [SM 9 4 ] ]\t3", "[MED 5 5 6 ]\t5"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "skyformer_jax.data.prepare", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def write_source(folder):
    for i, name in enumerate(("train", "val", "test"), start=1):
        rows = "\n".join(TREES[:i])
        (folder / f"basic_{name}.tsv").write_text(f"Source\tTarget\n{rows}\n")


def test_row_by_hand():
    examples = [{"tokens": [1] * n, "label": y} for n, y in ((2, 0), (4, 0), (6, 0), (8, 7))]
    assert prepare.row("task", "test", examples, 2_500_000) == [
        *("task", "test", "4", "25.0% - 75.0%"),
        *("5", "5", "7", "2.5"),
    ]


def test_prepares_and_prints_each_split(tmp_path):
    write_source(tmp_path)
    arguments = ("--task=listops", f"--source={tmp_path}", f"--data_dir={tmp_path / 'data'}")
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    header, *rows = first.stdout.splitlines()[-4:]  # TFDS has its say before the table
    assert header.split()[:3] == ["task", "split", "examples"]
    assert [row.split()[:3] for row in rows] == [
        ["listops", "train", "1"],
        ["listops", "validation", "2"],
        ["listops", "test", "3"],
    ]
    again = command(*arguments)
    assert (again.returncode, again.stdout.splitlines()) == (0, [header, *rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=nosuch"], "listops"),
        ([], "task"),
        (["--task=listops", "--source={}"], r"bad.*basic_test.tsv:3:"),
        (["--task=listops_small", "--source={}"], "generated"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    source = tmp_path / "bad"
    source.mkdir()
    write_source(source)
    (source / "basic_test.tsv").write_text("Source\tTarget\n[MAX 1 2 ]\t2\n[MAX 1 2\t2\n")
    result = command(
        *(argument.format(source) for argument in arguments), f"--data_dir={tmp_path / 'data'}"
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)
