"""Containers may lack a user name, a home directory, file locks and standard streams."""

import errno
import fcntl
import grp
import os
import pwd
import subprocess
import sys

import pytest
import test_compilation_cache
import tiny_data
from run_on import run_on
from test_runs import ENVIRONMENT, ROOT, train_command

from configs import quickstart
from skyformer_jax.errors import UserError
from skyformer_jax.files import expand, lock, unnamed_owners
from skyformer_jax.training.workdir import open_workdir

# sitecustomize.py, imported when Python starts: no user or group has a name, and locking fails.
NOTHING = """
import fcntl, grp, pwd

def unknown(number):
    raise KeyError(f"uid not found: {number}")

def no_locks(*arguments):
    raise OSError(37, "No locks available")

pwd.getpwuid = grp.getgrgid = unknown
fcntl.flock = no_locks
"""


@pytest.fixture
def bare(tmp_path):
    """Environment variables that start Python with NOTHING as sitecustomize.py and without HOME."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTHING)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "HOME"}
    return {**environment, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}


def start(environment, *arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def test_data_are_prepared_without_names_and_locks(tmp_path, monkeypatch, capsys):
    """Works although TFDS looks up file owners; another process's unfinished data stay in place."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    task = tiny_data.tiny_tasks()["listops"]
    other = tmp_path / "listops" / "tiny" / "incomplete.another"
    other.mkdir(parents=True)
    assert len(task.load("test", str(tmp_path))) == 30
    said = capsys.readouterr().err
    assert said.count("without locks (No locks available)") == 1
    assert other.exists()
    assert pwd.getpwuid is unknown and grp.getgrgid is unknown


def test_a_number_stands_for_a_name():
    free = next(n for n in range(54321, 65000) if n not in {e.pw_uid for e in pwd.getpwall()})
    known = pwd.getpwuid(os.getuid())
    with unnamed_owners():
        assert pwd.getpwuid(free).pw_name == str(free)
        assert grp.getgrgid(2**31 - 5).gr_name == str(2**31 - 5)
        assert pwd.getpwuid(os.getuid()) == known
    with pytest.raises(KeyError):
        pwd.getpwuid(free)


def test_a_lock_keeps_others_out(tmp_path, monkeypatch, capsys):
    with lock(tmp_path / "lock", wait=False) as held:
        assert held
        with pytest.raises(BlockingIOError), lock(tmp_path / "lock", wait=False):
            pass
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path / "lock", wait=False) as held:
        assert not held
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path} is on a file system without locks")


def test_a_home_that_is_not_known(tmp_path, monkeypatch, bare):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x"
    with pytest.raises(UserError, match=r"^~nobody-of-that-name/x begins with a home folder"):
        expand("~nobody-of-that-name/x")
    del bare["JAX_COMPILATION_CACHE_DIR"]
    program = test_compilation_cache.PROGRAM
    done = start(bare, "-c", program, "~/cache", cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("compilation_cache=~/cache: Could not determine home directory")
    assert not (tmp_path / "~").exists()


def test_a_folder_whose_name_is_no_text_is_refused_at_once(tmp_path):
    """Otherwise the first checkpoint would fail, and the steps before it would be lost."""
    name = tmp_path / os.fsdecode(b"caf\xe9")
    task = tiny_data.tiny_tasks()["listops"]
    with pytest.raises(UserError, match=r"caf.udce9' is not text .* set LC_ALL=C\.UTF-8"):
        task.load("test", str(name))
    config = quickstart.get_config()
    with pytest.raises(UserError, match="is not text"), open_workdir(run_on(config), name):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_goes_on_without_all_of_them(tmp_path, data_dir, bare):
    """A run finishes without names, locks and HOME, even if nobody reads its stdout."""
    reader, writer = os.pipe()
    os.close(reader)
    done = start(bare, *train_command(tmp_path / "run", data_dir)[1:], stdout=writer)
    os.close(writer)
    assert done.returncode == 128 + 13, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("without locks") == 1
    assert (tmp_path / "run" / "eval_test.json").exists()
    assert (tmp_path / "run" / "learning_curve.png").exists()


@pytest.mark.slow
def test_prepare_and_eval_without_all_of_them(tmp_path, bare):
    command = ("-m", "skyformer_jax.prepare", "--task=listops_small", "--data_dir=data")
    done = start(bare, *command, cwd=tmp_path, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "5,000" in done.stdout and "without locks" in done.stderr
    evaluate = [str(ROOT / "eval.py"), f"--workdir={tmp_path}/run"]
    for command in (train_command(tmp_path / "run", "data")[1:], evaluate):
        done = start(bare, *command, cwd=tmp_path, stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert "accuracy" in done.stdout


SPEAK = [
    sys.executable,
    "-c",
    """
import contextlib, os, sys
from skyformer_jax import cli
from skyformer_jax.progress import say, Progress

def main():
    with open(sys.argv[1].partition("=")[2], "w") as file:
        with contextlib.suppress(OSError):
            os.write(2, b"stray")  # libraries write to the descriptor directly
        say("progress")
        Progress(1, "work").update(1)
        file.write("own")
    print("result")

from absl import flags
flags.DEFINE_string("file", "", "")
cli.run(main)
""",
]


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-", ""])
def test_standard_streams_that_are_closed(tmp_path, closed):
    """Output is discarded; it must not land in the next file opened with the same descriptor."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *SPEAK, f"--file={tmp_path}/file"],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "own"


def test_a_full_log_does_not_stop_the_work(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*SPEAK, f"--file={tmp_path}/file"],
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert (tmp_path / "file").read_text() == "own"
