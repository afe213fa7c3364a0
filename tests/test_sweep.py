"""Sweeps: the grid, finished cells, the table and the command."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from sweeps import ended, finish, make, start

from experiments.paper import cell_results
from skyformer_jax.errors import UserError


def test_grid_says_what_is_reduced(tmp_path):
    overrides = ["text:data.source=lra", "text:train.num_steps=90", "data.dir=elsewhere"]
    cells = make(tmp_path, overrides=overrides)
    assert [cell.workdir.name for cell in cells] == [
        "listops-softmax-seed0",
        "text-softmax-seed0",
        "listops-softmax-seed1",
        "text-softmax-seed1",
    ]
    listops, text = cells[2:]
    assert listops.departures == {} and listops.asked["seed"] == 1
    assert text.departures == {"train.num_steps": (50_000, 90)}
    assert text.asked["data"]["source"] == str(Path.cwd() / "lra")
    assert "--config.data.source=lra" in text.arguments
    assert "--config.data.source=lra" not in listops.arguments

    (paper,) = make(tmp_path, ["text"], seeds="0", variant="paper")
    assert paper.departures == {} and paper.asked["train"]["batch_size"] == 32
    (small,) = make(tmp_path, ["listops"], ["skyformer"], seeds="0", variant="small")
    assert small.workdir.name == "listops-skyformer-small-seed0"
    (quickstart,) = make(tmp_path, ["quickstart"], ["skyformer"], seeds="0")
    assert small.departures == quickstart.departures
    assert small.departures["task"] == ("listops", "listops_small")
    assert small.departures["attention.num_landmarks"] == (128, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configs": ["lisops"]}, "did you mean 'listops'"),
        ({"configs": []}, "--configs is empty"),
        ({"attentions": ["skyforme"]}, "did you mean 'skyformer'"),
        ({"seeds": ["-1"]}, "not a whole number"),
        ({"variant": "tiny"}, "paper, small"),
        ({"overrides": ["train.num_steps"]}, r"not \[CONFIG:\]FIELD=VALUE"),
        ({"overrides": ["image:train.num_steps=5"]}, "'image'; choose one of: listops, text"),
        ({"overrides": ["train.steps=5"]}, "no such config field.*steps"),
        ({"overrides": ["train.num_steps=many"]}, "many"),
        ({"overrides": ["train.num_steps=80"]}, "train.warmup_steps"),
        ({"overrides": ["num_seeds=3"]}, "each cell has its own"),
        ({"seeds": ["3", "0", "1"], "together": True}, "--seeds=3,0,1 leaves some out"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path / "sweep", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_only_results_of_the_very_config_count(tmp_path):
    (cell,) = make(tmp_path, ["text"], seeds="0")
    (other,) = make(tmp_path, ["text"], seeds="0", overrides=["train.learning_rate=0.5"])
    row = cell_results.read_cell(cell)
    assert (row["status"], row["accuracy"], row["num_steps"]) == ("unfinished", None, 50_000)
    fields = set(row)

    finish(cell, 0.625)
    row = cell_results.read_cell(cell)
    assert (row["status"], row["accuracy"], row["checkpoint"]) == ("finished", 0.625, 700)
    assert (row["validation_accuracy"], row["data"]["checksum"]) == (0.635, "c0ffee")
    assert set(row) == fields
    json.dumps(row, allow_nan=False)
    (moved,) = make(tmp_path, ["text"], seeds="0", overrides=["data.dir=moved"])
    assert cell_results.read_cell(moved)["status"] == "finished"

    def refused(message, cell=cell):
        row = cell_results.read_cell(cell)
        assert (row["status"], row["accuracy"]) == ("refused", None)
        assert message in row["error"] and "\n" not in row["error"]
        assert set(row) == fields

    refused("train.learning_rate (saved: 0.0001, asked for: 0.5)", other)
    # A run of another config was started after the first run's checkpoints had been deleted.
    (cell.workdir / "config.json").write_text(json.dumps(other.asked))
    refused("older than config.json", other)
    finish(cell)
    (cell.workdir / "eval_test.json").write_text("{")
    refused("damaged")
    finish(cell)
    (cell.workdir / "config.json").unlink()
    refused("config.json is missing")
    (cell.workdir / "eval_test.json").unlink()
    assert cell_results.read_cell(cell)["status"] == "unfinished"


def test_table_and_summary(tmp_path):
    cells = make(tmp_path, attentions=["softmax", "skyformer"], seeds="012")
    accuracies = {"text-softmax": (0.5, 0.625, 0.53), "listops-skyformer": (0.375, 0.36)}
    for cell in cells:
        found = accuracies.get(f"{cell.config}-{cell.attention}", ())
        if cell.seed < len(found):
            finish(cell, found[cell.seed], checksum=f"{cell.seed // 2}")
    rows = [cell_results.read_cell(cell) for cell in cells]
    summary = {f"{row['config']}-{row['attention']}": row for row in cell_results.summarise(rows)}
    assert len(summary) == 4
    for name, found in accuracies.items():
        row = summary[name]
        assert row["num_seeds"] == len(found)
        np.testing.assert_allclose(row["mean"], np.mean(found))
        np.testing.assert_allclose(row["standard_deviation"], np.std(found, ddof=1))
        np.testing.assert_allclose(
            row["standard_error"], np.std(found, ddof=1) / np.sqrt(len(found))
        )
    assert summary["text-skyformer"]["mean"] is None
    assert cell_results.table(rows).splitlines() == [
        "| | listops | text |",
        "|---|---|---|",
        "| `softmax` | - | 55.17 ± 6.53 |",
        "| `skyformer` | 36.75 ± 1.06 (2 of 3) | - |",
        "",
        "listops: 50,000 steps of 32; full",
        "text: 50,000 steps of 16; full",
        "text: WARNING: its cells were evaluated on different data",
    ]
    one = [row for row in rows if row["seed"] == 0]
    assert "| `softmax` | - | 50.00 |" in cell_results.table(one)
    (small,) = make(tmp_path, ["text"], seeds="0", variant="small")
    said = cell_results.table([cell_results.read_cell(small)]).splitlines()[-1]
    assert said.startswith("text: 1,000 steps of 32; departs from the full setting in data.length")


@pytest.mark.slow
def test_command_collects_and_writes_the_array(tmp_path):
    status, stdout, stderr = ended(start(tmp_path, "--table", seeds="0,1"))
    assert (status, stderr) == (0, "0 of 4 cells are finished\n")
    assert "| `skyformer` | - |" in stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["seeds"] == [0, 1] and len(result["cells"]) == 4
    assert "train.num_steps=200" in result["overrides"]
    assert str(tmp_path) not in json.dumps(result)  # results hold no local paths
    assert {"commit", "versions", "device", "cores"} <= set(result)

    for cell in result["cells"]:
        if cell["seed"] == 0:
            cell.update(status="finished", accuracy=0.5)
    (tmp_path / "out.json").write_text(json.dumps(result))
    status, stdout, stderr = ended(start(tmp_path, "--table", "--add", seeds="1"))
    assert (status, stderr) == (0, "0 of 2 cells are finished; 2 others are kept\n")
    assert "| `skyformer` | 50.00 (1 of 2) |" in stdout
    added = json.loads((tmp_path / "out.json").read_text())
    assert (added["seeds"], added["cells"]) == ([0, 1], result["cells"])

    status, _, stderr = ended(start(tmp_path, f"--slurm={tmp_path}/s.sh"))
    assert status == 0 and "trains 2 cells" in stderr
    script = (tmp_path / "s.sh").read_text()
    assert "--configs=quickstart --attentions=softmax,skyformer --seeds=0" in script
    assert f"--set=data.dir={tmp_path}/data" in script and "--slurm" not in script


@pytest.mark.parametrize(
    ("out", "message"),
    [("", "is a folder; name a file"), ("other.json", "is not a JSON file of this script")],
)
def test_another_out_is_one_line_and_stays_as_it_is(tmp_path, out, message):
    (tmp_path / "other.json").write_text('{"rows": []}')
    arguments = ("--table", "--add", f"--out={tmp_path / out}")
    status, stdout, stderr = ended(start(tmp_path, *arguments, script="table1"))
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert (tmp_path / "other.json").read_text() == '{"rows": []}'


@pytest.mark.slow
def test_a_sweep_is_stopped_and_goes_on(tmp_path):
    process = start(tmp_path, "--workers=2")
    metrics = [
        tmp_path / f"cells/quickstart-{name}-seed0/metrics.jsonl"
        for name in ("softmax", "skyformer")
    ]
    while process.poll() is None and not any(path.exists() for path in metrics):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, stdout, stderr = ended(process)
    assert status == 128 + signal.SIGTERM, stderr
    assert "start the same command to go on" in stderr
    assert "| `softmax` | - |" in stdout
    assert not list(tmp_path.glob("cells/*/eval_test.json"))
    assert not (json.loads((tmp_path / "out.json").read_text()))["cells"][0]["error"]

    # A job of an array trains one cell and writes no file that other jobs write.
    (tmp_path / "out.json").unlink()
    status, stdout, stderr = ended(start(tmp_path, "--cell=1"))
    assert status == 0, stderr
    assert stdout == "" and not (tmp_path / "out.json").exists()

    status, stdout, stderr = ended(start(tmp_path, "--workers=2"))
    assert status == 0, stderr
    assert "1 of 2 cells are finished" in stderr and "2 of 2 cells finished, 0 left" in stderr
    result = json.loads((tmp_path / "out.json").read_text())
    for cell in result["cells"]:
        workdir = tmp_path / f"cells/quickstart-{cell['attention']}-seed0"
        evaluated = json.loads((workdir / "eval_test.json").read_text())
        assert cell["status"] == "finished" and cell["attempts"] == 2
        assert all(
            cell[k] == evaluated[k] for k in ("accuracy", "loss", "checkpoint", "data", "task")
        )
        log = (workdir / "train.log").read_text()
        assert "stopped after step" not in log or "going on from the checkpoint" in log
    assert "departs from the full setting in" in stdout

    status, _, stderr = ended(start(tmp_path, "--workers=2", "--set=train.learning_rate=0.01"))
    assert status == 1
    assert "train.learning_rate (saved: 0.002, asked for: 0.01)" in stderr
