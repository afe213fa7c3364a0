"""The built wheel, outside the repository: its console scripts find the configs it contains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the wheel, installed without dependencies, and environment variables for it."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip"]
    for command in (
        [*pip, "wheel", "--no-deps", f"--wheel-dir={folder / 'wheel'}", str(ROOT)],
        [*pip, "install", "--no-deps", f"--target={folder / 'site'}", "--no-index"],
    ):
        wheels = [str(path) for path in folder.glob("wheel/*.whl")] if "install" in command else []
        subprocess.run([*command, *wheels], check=True, capture_output=True, cwd=folder)
    return folder / "site", {**os.environ, "PYTHONPATH": str(folder / "site")}


def call(installed, cwd, script, *arguments):
    site, environment = installed
    command = [sys.executable, str(site / "bin" / script), *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_what_is_imported(installed, tmp_path):
    program = "import skyformer_jax; print(skyformer_jax.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=installed[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(installed[0]))


def test_it_prepares_trains_and_evaluates(installed, tmp_path):
    call(installed, tmp_path, "skyformer-prepare", "--config=configs/quickstart.py")
    short = ("--config.train.num_steps=4", "--config.train.warmup_steps=1")
    call(installed, tmp_path, "skyformer-train", "--config=configs/quickstart.py", *short)
    out = call(installed, tmp_path, "skyformer-eval", "--workdir=runs/quickstart")
    assert "accuracy" in out


@pytest.mark.parametrize("script", ["skyformer-train", "skyformer-eval", "skyformer-prepare"])
def test_help_explains_by_example(installed, tmp_path, script):
    site, environment = installed
    done = subprocess.run(
        [sys.executable, str(site / "bin" / script), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "    python " in done.stdout or "\npython " in done.stdout
    assert "--data_dir" in done.stdout or "--config" in done.stdout


def test_it_evaluates_a_released_model(installed, tmp_path):
    folder = ROOT / "checkpoints" / "listops-skyformer"
    call(installed, tmp_path, "skyformer-eval", f"--checkpoint_dir={folder}", "--out=again.json")
    result = json.loads((tmp_path / "again.json").read_text())
    assert result["accuracy"] == result["released"]
