"""Worker processes: they work from any script, return any result, and end when they should."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from skyformer_jax.data import parallel, pathfinder
from skyformer_jax.data.pathfinder import reader
from skyformer_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def test_a_plain_script_generates_and_is_imported_once(tmp_path):
    """Needs no `if __name__ == "__main__"`, even where local files shadow our modules' names."""
    for name in ("text.py", "random.py", "parallel.py"):
        (tmp_path / name).write_text("raise ImportError('another module')")
    script = tmp_path / "scripts" / "plain.py"
    script.parent.mkdir()
    script.write_text(
        "print('imported')\n"
        "from skyformer_jax.data import pathfinder\n"
        "images, labels = pathfinder.generate(1003, seed=3, workers=2)\n"
        "import numpy\n"
        "numpy.savez('images', images=images, labels=labels)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("imported\n", "")
    first, last = pathfinder.generate(4, seed=3), pathfinder.generate_chunk(32, "hard", 3, 1, 3)
    with np.load(tmp_path / "images.npz") as made:
        for name, of_first, of_last in zip(("images", "labels"), first, last, strict=True):
            np.testing.assert_array_equal(made[name][:4], of_first)
            np.testing.assert_array_equal(made[name][1000:], of_last)


def test_results_come_in_order_and_errors_in_their_place():
    arguments = [(np.full(3, i), 2) for i in range(9)]
    squares = parallel.ordered_map(np.power, arguments, workers=2)
    for i, square in enumerate(squares):
        np.testing.assert_array_equal(square, np.full(3, i**2))
    results = parallel.ordered_map(divmod, [(7, 2), (7, 0), (9, 2)], workers=2)
    assert next(results) == (3, 1)
    with pytest.raises(ZeroDivisionError) as error:
        next(results)
    assert "worker.py" in str(error.value.__notes__)
    missing = [(Path("nowhere"), Path(name), 8) for name in ("0.npy", "1.npy")]
    with pytest.raises(FileNotFoundError):  # rebuilt with its own arguments
        next(parallel.ordered_map(reader.read_block, missing, workers=2))


def test_what_cannot_be_sent_is_told():
    """Reports results that cannot be pickled, and errors whose constructor takes more arguments."""
    with pytest.raises(TypeError, match="cannot pickle"):
        next(parallel.ordered_map(threading.Lock, [()] * 2, workers=2))
    decode = [(b"\xff", "utf-8"), (b"", "utf-8")]
    with pytest.raises(UnicodeDecodeError):
        next(parallel.ordered_map(str, decode, workers=2))


def test_no_more_workers_than_calls():
    pids = list(parallel.ordered_map(os.getpid, [()] * 3, workers=99))
    assert len(set(pids)) <= 3 and os.getpid() not in pids
    assert list(parallel.ordered_map(os.getpid, [()], workers=99)) == [os.getpid()]
    assert list(parallel.ordered_map(os.getpid, [], workers=99)) == []


def test_workers_end_with_the_results_and_a_killed_one_is_said():
    pids = parallel.ordered_map(os.getpid, [()] * 50, workers=2)
    pid = next(pids)
    os.kill(pid, 0)
    pids.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(UserError, match="a worker process was killed"):
        list(parallel.ordered_map(signal.raise_signal, [(signal.SIGKILL,)] * 2, workers=2))
