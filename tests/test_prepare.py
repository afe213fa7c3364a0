"""The command that prepares data sets, run as a user runs it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_data import from_sequences

from skyformer_jax import prepare, tasks
from skyformer_jax.data import pathfinder

TREES = ["[MAX 1 2 ]\t2", "[MIN 3 [SM 9 4 ] ]\t3", "[MED 5 5 6 ]\t5"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "skyformer_jax.prepare", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def write_source(folder):
    for i, name in enumerate(("train", "val", "test"), start=1):
        rows = "\n".join(TREES[:i])
        (folder / f"basic_{name}.tsv").write_text(f"Source\tTarget\n{rows}\n")


def test_row_by_hand():
    sequences = [np.full(n, 1, np.uint8) for n in (2, 4, 6, 8)]
    examples = from_sequences(sequences, [0, 0, 0, 1])
    assert prepare.row("task", "test", examples, 2_500_000) == [
        *("task", "test", "4", "25.0% - 75.0%"),
        *("5", "5", "7", "8", "2.5", examples.checksum()),
    ]


def test_prepares_and_prints_each_split(tmp_path):
    write_source(tmp_path)
    arguments = ("--task=listops", f"--source={tmp_path}", f"--data_dir={tmp_path / 'data'}")
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    header, *rows = first.stdout.splitlines()
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


def workers_of(process):
    """Process ids of the worker processes of a preparation."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(child) for child in Path(children).read_text().split()]


def gone(pid):
    try:
        return "zombie" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_an_interrupted_preparation_goes_on(tmp_path):
    """A preparation that was killed and then stopped by Ctrl-C ends with the same data.

    No worker process outlives it.
    """
    arguments = ["--task=pathfinder_small", f"--data_dir={tmp_path}"]
    start = [sys.executable, "-m", "skyformer_jax.prepare", *arguments]
    kind = "pathfinder/blocks-small_32_hard-*"
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = len(list(tmp_path.glob(f"{kind}/*.npz")))
        process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob(f"{kind}/*.npz"))) < before + 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = workers_of(process)
        assert len(workers) >= 2
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == status
        if number == signal.SIGINT:
            assert stderr.splitlines()[-1].startswith("error: interrupted; start the same command")
        deadline = time.monotonic() + 30
        while not all(map(gone, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not list(tmp_path.glob("pathfinder/small_32_hard/*/dataset_info.json"))
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ of 20 blocks of images are there already", done.stderr)
    assert not list(tmp_path.glob(kind))
    images, labels = pathfinder.generate(20_000)
    expected = sorted(zip(images.reshape(20_000, -1).tolist(), labels.tolist(), strict=True))
    task = tasks.get("pathfinder_small")
    stored = [
        (example["tokens"].tolist(), example["label"])
        for split in tasks.SPLITS
        for example in task.load(split, tmp_path)
    ]
    assert sorted(stored) == expected
