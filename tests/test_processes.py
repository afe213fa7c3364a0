"""Real runs of several processes on 127.0.0.1, with fake devices, compared with one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from run_on import run_on
from test_runs import TINY, train_command

from skyformer_jax.training import checkpoints, processes
from skyformer_jax.training.config import read
from skyformer_jax.training.state import state_spec

ROOT = Path(__file__).parent.parent
SETTING = {**TINY, "train.num_steps": 60, "train.log_every": 4, "train.batch_size": 64}


def environment(num_devices):
    flag = f"--xla_force_host_platform_device_count={num_devices}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", flag, os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags}


def start(command, num_devices):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(num_devices),
    )


def start_two(command, flags="--config.parallel."):
    """Starts two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = [*command, f"{flags}coordinator={address}", f"{flags}num_processes=2"]
    return [start([*common, f"{flags}process_id={i}"], 4) for i in range(2)]


def finish(*running):
    """Waits for the processes; returns (status, stdout, stderr) of each."""
    try:
        ends = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *end) for process, end in zip(running, ends, strict=True)]


def is_gloo(text):
    """Returns True if text holds only Gloo's messages, whose threads may interleave their lines."""
    pieces = r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. |\n"
    pieces += "|Expected number of connected peer ranks is : "
    return re.fullmatch(f"({pieces})*", text) is not None


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """The workdir of a finished run of one process on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    ((status, _, stderr),) = finish(start(train_command(workdir, data_dir, **SETTING), 1))
    assert status == 0, stderr
    return workdir


def entries(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def assert_same_run(workdir, other):
    """Checks that parameters, curves and evaluations of two runs agree up to rounding."""

    def final(folder):
        spec = state_spec(run_on(read(folder / "config.json")))
        return checkpoints.restore(folder / "checkpoints", 60, spec)[0].params

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), final(workdir), final(other)
    )
    for one, two in zip(entries(workdir), entries(other), strict=True):
        assert (one["step"], one["split"]) == (two["step"], two["split"])
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-3)
    one, two = (json.loads((x / "eval_test.json").read_text()) for x in (workdir, other))
    assert one["config_digest"] == two["config_digest"]
    assert abs(one["accuracy"] - two["accuracy"]) < 2e-3
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-3)


@pytest.mark.slow
def test_two_processes_then_one_on_another_mesh(alone, tmp_path, data_dir):
    """SIGTERM to one of two processes stops both; one process resumes with sharded sequences."""
    workdir = tmp_path / "run"
    command = train_command(workdir, data_dir, **SETTING)
    running = start_two(command)
    deadline = time.monotonic() + 240
    while not entries(workdir) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in running), finish(*running)
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    (status, out, stderr), (other_status, other_out, other_stderr) = finish(*running)
    assert status == other_status == 0, stderr + other_stderr
    assert "8 cpu device(s) of 2 processes" in stderr
    (stopped,) = re.findall(r"stopped after step (\d+); saved", stderr)
    assert 4 < int(stopped) < 60
    assert checkpoints.steps(workdir / "checkpoints")[-1] == int(stopped)
    # Only the first process prints.
    assert is_gloo(out) and is_gloo(other_out) and "step" not in other_stderr

    mesh = {"parallel.data": 2, "parallel.seq": 2, "train.accumulation": 2}
    ((status, _, stderr),) = finish(
        start([*train_command(workdir, data_dir, **SETTING, **mesh)], 4)
    )
    assert status == 0, stderr
    assert f"going on from the checkpoint of step {stopped}" in stderr
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_sequences_over_two_processes(alone, tmp_path, data_dir):
    """Each process holds half of every sequence; then both evaluate with the command."""
    workdir = tmp_path / "run"
    command = train_command(workdir, data_dir, **SETTING, **{"parallel.data": 1, "parallel.seq": 8})
    for status, _, stderr in finish(*start_two(command)):
        assert status == 0, stderr
    assert_same_run(workdir, alone)
    before = json.loads((workdir / "eval_test.json").read_text())
    (workdir / "eval_test.json").unlink()
    command = [sys.executable, str(ROOT / "eval.py"), f"--workdir={workdir}"]
    (status, out, stderr), (other_status, other_out, _) = finish(*start_two(command, "--"))
    assert status == other_status == 0, stderr
    assert "accuracy" in out and is_gloo(other_out)
    after = json.loads((workdir / "eval_test.json").read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_costs_nothing(alone, tmp_path, data_dir):
    workdir = tmp_path / "run"
    command = train_command(workdir, data_dir, **SETTING)
    running = start_two(command)
    while not checkpoints.steps(workdir / "checkpoints"):
        assert all(process.poll() is None for process in running), finish(*running)
        time.sleep(0.01)
    running[1].kill()
    (status, _, _), _ = finish(*running)
    assert status != 0
    for status, _, stderr in finish(*start_two(command)):
        assert status == 0, stderr
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_what_one_process_cannot_do_ends_both(alone, tmp_path, data_dir):
    """Both processes exit with status 2 and say why."""
    workdir = tmp_path / "run"
    command = train_command(workdir, data_dir, **SETTING)
    running = start_two(command)
    running[1].kill()
    running[1] = start([*running[1].args, "--config.data.dir=/proc/nowhere"], 4)
    (status, _, stderr), (other_status, _, other_stderr) = finish(*running)
    assert status == other_status == 2
    assert "error: process 1 failed; its output says why" in stderr
    assert "/proc/nowhere" in other_stderr


FIND = """
import jax
from skyformer_jax.training import processes
processes.start("auto")
print(jax.process_index(), jax.process_count(), processes.all_gather(10 + jax.process_index()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "ompi", "jax"])
def test_processes_find_each_other_by_the_environment(launcher):
    """Sets the environment variables of the launchers instead of running them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = port % 2**12  # JAX derives the port from it
    variables = {
        "slurm": {
            "SLURM_JOB_ID": f"{job}",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "{i}",
            "SLURM_LOCALID": "{i}",
        },
        "ompi": {
            "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "{i}",
            "OMPI_COMM_WORLD_LOCAL_RANK": "{i}",
        },
        "jax": {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "{i}",
        },
    }[launcher]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FIND],
            env={
                **environment(1),
                "PYTHONPATH": str(ROOT),
                **{name: value.format(i=i) for name, value in variables.items()},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for i, (status, out, stderr) in enumerate(finish(*running)):
        assert status == 0, stderr
        ours = f"{i} 2 [10, 11]\n"
        assert out.endswith(ours) and is_gloo(out.removesuffix(ours))


def test_the_end_of_another_process_is_one_line(monkeypatch):
    """Only with several processes, and only if the failure means that a process was lost."""
    reset = "UNKNOWN: Gloo all-reduce failed: Read error [::1]:5: Connection reset by peer"

    def raised(text):
        with pytest.raises(Exception) as info, processes.lost_process_errors():
            raise jax.errors.JaxRuntimeError(text)
        return info.type

    assert raised(reset) is jax.errors.JaxRuntimeError
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert raised(reset) is processes.LostProcessError
    assert raised("RESOURCE_EXHAUSTED: out of memory") is jax.errors.JaxRuntimeError


def test_what_does_not_add_up_is_one_line(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(processes.UserError, match=r"parallel\.num_processes and"):
        processes.start("127.0.0.1:1", 2, 5)
    processes.start("")
    assert processes.broadcast(None) is None and processes.all_gather(3) == [3]
