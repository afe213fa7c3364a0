"""Sweeps: the worker processes, their signals, and the Slurm script."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import HERE, finish, make, prepare, put_stub, tell, train

from experiments.paper import cell_results, slurm, workers


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Four cells that are trained by the stub, which is told to finish them."""
    put_stub(tmp_path, monkeypatch)
    return prepare(make(tmp_path / "sweep"))


def test_failures_are_recorded_and_tried_again(cells):
    tell(cells[0], "fail")
    tell(cells[1], "crash")
    assert set(map(id, train(cells))) == set(map(id, cells))
    rows = [cell_results.read_cell(cell) for cell in cells]
    assert [row["status"] for row in rows] == ["failed", "failed", "finished", "finished"]
    assert rows[0]["error"] == "the disk is full"
    assert rows[1]["error"] == "killed by SIGKILL after: KeyError: 3"
    assert (rows[2]["provenance"], rows[2]["attempts"]) == (HERE, 1)
    tell(cells[0], "finish")
    train(cells[:1])
    row = cell_results.read_cell(cells[0])
    assert (row["status"], row["error"], row["attempts"]) == ("finished", None, 2)
    assert row["seconds"] >= rows[0]["seconds"]


def test_cells_stand_still_while_paused(cells, tmp_path):
    """While paused, no cell starts, and a running one is suspended; it continues afterwards."""
    tell(cells[0], "wait")
    pause, signals, states = tmp_path / "pause", [], []

    def state_of_waiting():
        pid = (cells[0].workdir / "pid").read_text()
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]

    environments = workers.make_environments(1, [])
    looks = workers.train_cells(cells[:2], environments, HERE, signals, idle=True, pause=pause)
    for _ in looks:
        if not (cells[0].workdir / "waiting").exists():
            continue
        if not states:
            pause.touch()
            states.append("asked")
        elif states[-1] == "asked" and state_of_waiting() == "T":
            states.append("stopped")
            pause.unlink()
        elif states[-1] == "stopped" and state_of_waiting() != "T":
            states.append("going on")
            signals.append(signal.SIGTERM)
    assert states == ["asked", "stopped", "going on"]


def test_a_signal_lets_the_running_cells_save(cells):
    tell(cells[0], "wait")
    tell(cells[1], "wait")

    def stop(signals):
        # Schedulers may repeat SIGTERM; the cells must see one.
        if all((cell.workdir / "waiting").exists() for cell in cells[:2]):
            signals += [signal.SIGTERM] * 2

    assert set(map(id, train(cells, then=stop))) == set(map(id, cells[:2]))
    assert {cell_results.read_cell(cell)["status"] for cell in cells} == {"unfinished"}
    for cell in cells[:2]:
        assert (cell.workdir / "train.log").read_text() == "stopped after step 3; saved.\n"
    assert not (cells[2].workdir / "train.log").exists()
    assert not train(cells, signals=[signal.SIGINT])


def test_a_cell_that_another_process_trains_is_waited_for(cells, capsys):
    cell = cells[0]
    for finishes in (False, True):
        looks = []
        with (cell.workdir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

            def look(signals, looks=looks, lock=lock, finishes=finishes):
                looks.append(cell_results.read_cell(cell)["status"])
                if len(looks) == 5:
                    if finishes:
                        finish(cell, 0.75)
                    fcntl.flock(lock, fcntl.LOCK_UN)

            assert train(cells[:1], then=look) == [cell]
        assert looks[:5] == ["unfinished"] * 5
        assert "another process is training it" in capsys.readouterr().err
        row = cell_results.read_cell(cell)
        assert row["accuracy"] == (0.75 if finishes else 0.5)
        assert row["attempts"] == 1  # our own attempt, from the first round
        (cell.workdir / "eval_test.json").unlink()


def test_devices_are_dealt_to_the_workers(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in workers.make_environments(None, ["2", "5"])] == [
        "2",
        "5",
    ]
    shared = workers.make_environments(3, ["2", "5"])
    assert [e["CUDA_VISIBLE_DEVICES"] for e in shared] == ["2", "5", "2"]
    assert {e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in shared} == {"0.450"}
    assert len(workers.make_environments(None, [])) == 1


@pytest.mark.parametrize(
    ("number", "called"),
    [(signal.SIGUSR1, "scontrol requeue 7_3"), (signal.SIGTERM, "sleep 600")],
)
def test_slurm_script_saves_and_requeues(tmp_path, number, called):
    """Runs the script in a real bash with stub commands and signals it as Slurm would."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("scontrol", "sleep"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> "{tmp_path}/called"\n')
        (tmp_path / name).chmod(0o755)
    command = folder / "command"
    command.write_text(
        f"""#!{sys.executable}
import pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
pathlib.Path("started").touch()
signal.sigwait([signal.SIGTERM])
pathlib.Path("arguments").write_text(" ".join(sys.argv[1:]))
sys.exit(143)
"""
    )
    command.chmod(0o755)
    text = slurm.slurm_script([str(command), "--set=a b"], 54, 8, folder, folder)
    assert "#SBATCH --array=0-53%8\n" in text
    assert "#SBATCH --array=0-53\n" in slurm.slurm_script([], 54, None, folder, folder)
    script = tmp_path / "sweep.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    job = subprocess.Popen(["bash", script], env=environment)
    while not (folder / "started").exists() and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(60) != 0
    assert (folder / "arguments").read_text() == "--set=a b --cell=3"
    assert (tmp_path / "called").read_text() == called + "\n"
