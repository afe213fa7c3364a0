"""The scripts for the paper's tables and figures: what they keep, skip and resume."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from scripts import import_script

from experiments.paper import grid
from experiments.paper.grid import parse_config
from skyformer_jax.attention import NAMES, softmax_attention
from skyformer_jax.errors import UserError
from skyformer_jax.training import checkpoints
from skyformer_jax.training.state import state_spec

grid_flags = import_script("paper.grid_flags")
cell_rows = import_script("paper.cell_rows")
first_steps = import_script("paper.first_steps")
ROOT = Path(__file__).resolve().parent.parent


FLAGS = {
    "ATTENTIONS": ["softmax", "skyformer"],
    "SEEDS": ["0"],
    "VARIANT": "",
    "SMALL": False,
    "SET": [],
    "TOGETHER": False,
}


def give(monkeypatch, module, **values):
    """Sets flags of a script to the given values."""
    for name, value in values.items():
        monkeypatch.setattr(module, name, types.SimpleNamespace(value=value))


def draw(result, path):
    path.write_text(str(len(result["rows"])))


def test_rows_are_kept_and_gone_on_with(monkeypatch, tmp_path):
    measured = []

    def measure(cell):
        measured.append((cell.config, cell.attention))
        if cell.config == "retrieval":
            raise UserError("no papers here")
        return {"score": len(measured)}

    def go(configs, **settings):
        measured.clear()
        places = {"DIR": str(tmp_path / "runs"), "OUT": str(tmp_path / "out.json")}
        give(monkeypatch, grid_flags, **FLAGS, **places, CONFIGS=configs)
        cell_rows.keep_rows("a score (of sorts)", settings, measure, draw)
        return json.loads((tmp_path / "out.json").read_text())

    result = go(["listops"], steps=2)
    assert measured == [("listops", "softmax"), ("listops", "skyformer")]
    assert (tmp_path / "out.png").read_text() == "2"
    assert result["steps"] == 2 and result["rows"][1]["score"] == 2
    assert result["rows"][1]["length"] == 2048 and result["rows"][1]["batch_size"] == 32

    result = go(["listops", "retrieval"], steps=2)
    assert measured == [("retrieval", "softmax"), ("retrieval", "skyformer")]
    assert [row.get("skipped") for row in result["rows"]] == [None, None] + 2 * ["no papers here"]
    go(["listops", "retrieval"], steps=2)
    assert len(measured) == 2  # skipped cells are tried again
    result = go(["image"], steps=3)
    assert {row["config"] for row in result["rows"]} == {"image"}  # other settings start over


def test_the_small_grid(monkeypatch):
    configs = ["listops", "text", "retrieval", "image", "pathfinder"]
    give(monkeypatch, grid_flags, **FLAGS, DIR="runs", CONFIGS=configs)
    give(monkeypatch, grid_flags, ATTENTIONS=["nystromformer"], SMALL=True)
    cells = grid_flags.make_cells()
    num_steps = {cell.config: cell.asked["train"]["num_steps"] for cell in cells}
    assert num_steps == dict(zip(configs, (800, 800, 500, 1000, 500), strict=True))
    assert all(cell.departures["attention.num_landmarks"] == (128, 32) for cell in cells)
    give(monkeypatch, grid_flags, VARIANT="paper")
    with pytest.raises(UserError, match="leave out --variant=paper"):
        grid_flags.make_cells()


@pytest.mark.slow
def test_figure1_measures_each_approximation(monkeypatch):
    figure1 = import_script("paper.figure1")
    give(monkeypatch, figure1, _DRAWS=2)
    all_of_them = figure1.approximations
    assert set(all_of_them(8, 16)) == set(NAMES) - {"softmax", "kernelized", "reformer"}
    names = ("nystromformer", "performer")
    monkeypatch.setattr(
        figure1, "approximations", lambda *a: {name: all_of_them(*a)[name] for name in names}
    )
    inputs = [tuple(np.asarray(jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))))]
    rows = figure1.measure(inputs, [8], "test")
    found = {(row["attention"], row["num_features"]): row for row in rows}
    exact = np.asarray(softmax_attention(*inputs[0]))[0]
    out = np.asarray(figure1.approximations(8, 16)["nystromformer"](*inputs[0], rng=None))[0]
    errors = [
        np.linalg.svd((out - exact)[:, head], compute_uv=False)[0]
        / np.linalg.svd(exact[:, head], compute_uv=False)[0]
        for head in range(2)
    ]
    row = found["nystromformer", 8]
    np.testing.assert_allclose(row["relative_error"]["mean"], np.mean(errors), rtol=1e-3)
    assert row["relative_error"]["count"] == 2 and row["failed"] == 0
    assert found["performer", 8]["relative_error"]["count"] == 4


@pytest.mark.slow
def test_first_steps_are_those_of_a_run(tmp_path, data_dir):
    overrides = [f"data.dir={data_dir}", "train.num_steps=3", "train.eval_every=3"]
    overrides += ["train.warmup_steps=1", "parallel.data=1"]
    (cell,) = grid.make_grid(["quickstart"], ["performer"], ["1"], "", overrides, tmp_path)
    of_cell = first_steps.one_device_run(parse_config(cell.arguments))
    split = of_cell.load_split("train")
    found, where = first_steps.train(of_cell, split, 3, tmp_path)
    # Uses the same compiler options, since Adam's first steps amplify rounding, and one device.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    subprocess.run(
        [sys.executable, "train.py", *cell.arguments, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
    )
    run, _ = checkpoints.restore(tmp_path / "run" / "checkpoints", 3, state_spec(of_cell))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[-1], run.variables)
    again, kept = first_steps.train(of_cell, None, 2, tmp_path)  # from the file, without examples
    assert kept == where and len(again) == 3
    jax.tree.map(np.testing.assert_array_equal, again, found[:3])
    # Stored steps from another initialization are not reused.
    kept = dict(np.load(tmp_path / "first_steps.npz"))
    kept["params/head_out/bias"][0] += 1e-3
    np.savez(tmp_path / "first_steps.npz", **kept)
    anew, _ = first_steps.train(of_cell, split, 3, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, anew, found)


def run(script, *arguments):
    command = [sys.executable, "-m", f"experiments.paper.{script}", *map(str, arguments)]
    # GIT_DIR hides the commit, since results from uncommitted changes would start over.
    environment = {**os.environ, "XLA_FLAGS": "", "GIT_DIR": os.devnull}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_the_commands(tmp_path, data_dir):
    """Runs each tiny script as a user would, and makes the report from their results."""
    common = ("--small", "--configs=listops", "--attentions=softmax,skyformer", "--seeds=0")
    common += (f"--set=data.dir={data_dir}", f"--dir={tmp_path / 'runs'}")

    def out(name):
        return f"--out={tmp_path / 'results' / name}.json"

    run("stability", *common, "--steps=3", out("stability"))
    done = run("singular_values", *common, "--steps=3", out("singular_values"))
    assert "listops-skyformer-small-seed0: the steps are kept from an earlier call" in done.stderr
    tiny = ("--set=train.num_steps=4", "--set=train.warmup_steps=1", "--set=train.eval_every=2")
    run("table1", *common, *tiny, out("table1"))
    assert "2 of 2 cells are finished" in run("table1", *common, *tiny, out("table1")).stderr
    run("figure2", *common, *tiny, "--rounds=2", out("figure2"))
    run("table2", *common, *tiny, "--rounds=2", "--small_batches", out("table2"))
    assert "listops is measured already" in (
        run("table2", *common, *tiny, "--rounds=2", "--small_batches", out("table2")).stderr
    )
    subprocess.run(
        [sys.executable, "-m", "experiments.paper.report", f"--results={tmp_path / 'results'}"],
        cwd=ROOT,
        check=True,
    )
    report = (tmp_path / "results" / "REPORT.md").read_text()
    assert report.count("Not yet run: `python -m experiments.paper.") == 1  # figure1
    for name in ("stability", "singular_values", "table1", "figure2", "table2"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000
    curves = json.loads((tmp_path / "results" / "figure2.json").read_text())["rows"]
    assert [point["step"] for point in curves[0]["validation"]] == [2, 4]
