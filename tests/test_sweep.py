"""Sweeps: the grid, finished cells, the table, the worker processes and the Slurm script."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_runs import TINY

from experiments import records
from experiments.paper import cell_results, grid, slurm, workers
from skyformer_jax.errors import UserError
from skyformer_jax.training.config import read, stored
from skyformer_jax.training.results import config_digest, wilson_interval
from skyformer_jax.training.workdir import seed_runs

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}
HERE = {"commit": "abc", "device": "1 x cpu"}


def make(folder, configs=("listops", "text"), attentions=("softmax",), seeds="01", **options):
    options = {"variant": "", "overrides": [], **options}
    return grid.make_grid(configs, attentions, list(seeds), directory=folder, **options)


TOGETHER = {"configs": ["listops"], "attentions": ["softmax", "skyformer"], "together": True}


def finish(cell, accuracy=0.5, checksum="c0ffee", config=None):
    """Writes into the cell's folder what a finished train.py leaves, except for checkpoints."""
    cell.workdir.mkdir(parents=True, exist_ok=True)
    config = config or cell.asked
    kind = config["data"]["kind"] or "generated"  # train.py's choice if none is set
    saved = {**config, "data": {**config["data"], "kind": kind}}
    (cell.workdir / "config.json").write_text(json.dumps(saved))
    result = {
        "examples": 2000,
        "checkpoint": 700,
        "validation": {"loss": 1.5, "accuracy": accuracy + 0.01},
        "accuracy": accuracy,
        "interval_95": wilson_interval(accuracy, 2000),
        "loss": 1.6,
        "floors": {"most frequent class": 0.17},
        "config_digest": config_digest(read(cell.workdir / "config.json")),
        "data": {"name": "d/1.0.0", "source": "", "notes": [], "checksum": checksum},
    }
    (cell.workdir / "eval_test.json").write_text(json.dumps(result))


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


def test_seeds_trained_together_are_the_cells_of_one_run(tmp_path):
    alone = make(tmp_path, **{**TOGETHER, "together": False}, seeds="213")
    cells = make(tmp_path, **TOGETHER, seeds="213", variant="")
    assert [cell.name for cell in cells[:3]] == [
        "listops-softmax/seed-2",
        "listops-skyformer/seed-2",
        "listops-softmax/seed-1",
    ]
    assert [cell.run_dir.name for cell in cells] == ["listops-softmax", "listops-skyformer"] * 3
    for cell, one in zip(cells, alone, strict=True):
        assert (cell.asked, cell.departures) == (one.asked, one.departures)
        assert cell.arguments == one.arguments == one.run_arguments
        assert (cell.seeds_at_once, one.seeds_at_once) == (3, 1)
        assert cell.workdir == cell.run_dir / f"seed-{cell.seed}" and one.workdir == one.run_dir
        config = grid.parse_config(cell.run_arguments)
        found = {run.workdir: run.config for run in seed_runs(config, cell.run_dir)}
        assert len(found) == 3 and stored(found[cell.workdir]) == cell.asked
    (small,) = make(tmp_path, ["listops"], seeds="0", variant="small", together=True)
    assert [small] == make(tmp_path, ["listops"], seeds="0", variant="small")
    small = make(tmp_path, ["listops"], seeds="01", variant="small", together=True)
    assert small[1].name == "listops-softmax-small/seed-1"


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


def test_seeds_of_elsewhere_are_kept_if_of_the_same_setting(tmp_path):
    here, path = make(tmp_path / "here", seeds="1"), tmp_path / "out.json"
    assert cell_results.read_others(path, here) == []

    def refused(message, cells=here):
        with pytest.raises(UserError, match=message):
            cell_results.read_others(path, cells)

    def earlier(**options):
        cells = make(tmp_path / "elsewhere", overrides=["text:train.num_steps=90"], **options)
        for cell in cells[1:]:
            finish(cell, 0.25)
        path.write_text(json.dumps({"cells": [cell_results.read_cell(cell) for cell in cells]}))

    earlier(seeds="012")
    refused("text softmax, seed 0, of another setting")
    same = make(tmp_path / "here", seeds="1", overrides=["text:train.num_steps=90"])
    rows = cell_results.read_others(path, same)
    assert [(row["config"], row["seed"]) for row in rows] == [
        ("text", 0),
        ("listops", 2),
        ("text", 2),
    ]
    assert all(row["accuracy"] == 0.25 for row in rows)
    for text in ("{", "[]", '{"cells": [{}]}'):
        path.write_text(text)
        refused("not a JSON file of this script")


def test_a_table_is_assembled_from_several_commands(tmp_path):
    """Two attentions with two seeds, then one with a single seed, then another config."""
    path = tmp_path / "out.json"

    def command(name, accuracy, **options):
        cells = make(tmp_path / name, **options)
        for cell in cells:
            finish(cell, accuracy)
        rows = [cell_results.read_cell(cell) for cell in cells]
        rows = cell_results.in_order([*cell_results.read_others(path, cells), *rows])
        records.write_json(path, {"cells": rows})
        return records.as_read(rows)

    fewer = {"configs": ["listops"], "overrides": ["train.num_steps=9000"]}
    command("text", 0.75, configs=["text"], attentions=["skyformer"], seeds="0")
    command("one", 0.5, attentions=["performer"], seeds="0", **fewer)
    gpu = {"attentions": ["skyformer", "softmax"], "seeds": "10", "together": True}
    rows = command("gpu", 0.25, **gpu, **fewer)
    assert [(row["seed"], row["config"], row["attention"]) for row in rows] == [
        (0, "listops", "softmax"),
        (0, "listops", "skyformer"),
        (0, "listops", "performer"),
        (0, "text", "skyformer"),
        (1, "listops", "softmax"),
        (1, "listops", "skyformer"),
    ]
    assert [len(row["departures"]) for row in rows] == [1, 1, 1, 0, 1, 1]
    assert [row["seeds_at_once"] for row in rows] == [2, 2, 1, 1, 2, 2]
    assert command("gpu", 0.25, **gpu, **fewer) == rows  # nothing is kept twice
    assert command("one", 0.5, attentions=["performer"], seeds="0", **fewer) == rows
    assert cell_results.table(rows).splitlines() == [
        "| | listops | text |",
        "|---|---|---|",
        "| `softmax` | 25.00 ± 0.00 | - |",
        "| `skyformer` | 25.00 ± 0.00 | 75.00 (1 of 2) |",
        "| `performer` | 50.00 (1 of 2) | - |",
        "",
        "listops: 9,000 steps of 32; departs from the full setting in train.num_steps",
        "text: 50,000 steps of 16; full",
    ]
    summary = cell_results.summarise(rows)
    assert [(row["config"], row["attention"], row["num_seeds"]) for row in summary] == [
        ("listops", "softmax", 2),
        ("listops", "skyformer", 2),
        ("listops", "performer", 1),
        ("text", "skyformer", 1),
    ]
    # A config whose attentions have different settings is no comparison, and the table says so.
    rows = command("full", 0.5, configs=["listops"], attentions=["linformer"], seeds="0")
    assert cell_results.table(rows).splitlines()[-2:] == [
        "listops: WARNING: its cells were trained in different settings",
        "text: 50,000 steps of 16; full",
    ]


def test_a_kept_cell_must_be_of_the_same_variant_and_known(tmp_path):
    """The variants paper and fast have no departures, and are still other settings."""
    path = tmp_path / "out.json"
    (paper,) = make(tmp_path, ["text"], seeds="0", variant="paper")
    finish(paper)
    row = cell_results.read_cell(paper)
    assert (row["variant"], row["departures"]) == ("paper", {})
    earlier = {name: value for name, value in row.items() if name != "variant"}
    for content in ({"cells": [row]}, {"variant": "paper", "cells": [earlier]}):
        records.write_json(path, content)
        with pytest.raises(UserError, match="text softmax, seed 0, of another setting"):
            cell_results.read_others(path, make(tmp_path, ["text"], seeds="1"))
        same = make(tmp_path, ["text"], seeds="1", variant="paper")
        assert cell_results.read_others(path, same) == [row]
        assert cell_results.read_others(path, make(tmp_path, ["listops"], seeds="0")) == [row]
    for field, message in (("config", "unknown config in"), ("attention", "unknown attention in")):
        records.write_json(path, {"cells": [{**row, field: "other"}]})
        with pytest.raises(UserError, match=message) as caught:
            cell_results.read_others(path, same)
        assert "\n" not in str(caught.value)


# Behaves like train.py as far as a sweep can see, but without training.
STUB = """
import json, os, pathlib, shutil, signal, sys, time
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
with (workdir / "arguments").open("a") as file:
    print(*sys.argv[1:], file=file)
do = json.loads((workdir / "do.json").read_text())
if do == "wait":
    def stop(*_):
        print("stopped after step 3; saved.", file=sys.stderr)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (workdir / "pid").write_text(str(os.getpid()))
    (workdir / "waiting").touch()
    while True:
        time.sleep(0.05)
if do == "fail":
    print("error: the disk is full\\n\\nFatal: nothing", file=sys.stderr)
    sys.exit(2)
if do == "crash":
    print("Traceback:\\nKeyError: 3", file=sys.stderr, flush=True)
    signal.raise_signal(signal.SIGKILL)
for result in [*workdir.glob("seed-*/result")] or [workdir / "result"]:
    shutil.move(result, result.with_name("eval_test.json"))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Has the stub in the place of train.py."""
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_LOOKS", 0.02)
    (tmp_path / "train.py").write_text(STUB)


def prepare(cells):
    """Tells the stub to finish these cells."""
    for cell in cells:
        finish(cell)
        shutil.move(cell.workdir / "eval_test.json", cell.workdir / "result")
        tell(cell, "finish")
    return cells


@pytest.fixture
def cells(tmp_path, stub):
    """Four cells that are trained by the stub, which is told to finish them."""
    return prepare(make(tmp_path / "sweep"))


@pytest.fixture
def together(tmp_path, stub):
    """Four cells in two runs of two seeds, which the stub is told to finish."""
    return prepare(make(tmp_path / "sweep", **TOGETHER))


def tell(cell, what):
    (cell.run_dir / "do.json").write_text(json.dumps(what))


def train(cells, num_workers=2, signals=(), then=None):
    """Trains until all workers end; returns the ended cells. Each poll calls then(signals)."""
    ended, signals = [], list(signals)
    environments = workers.make_environments(num_workers, [])
    for some in workers.train_cells(cells, environments, HERE, signals):
        ended += some
        if then:
            then(signals)
    return ended


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


def test_seeds_are_trained_together_by_one_process(together):
    ended = train(together)
    assert len(ended) == 4 and set(map(id, ended)) == set(map(id, together))
    for name in TOGETHER["attentions"]:
        folder = together[0].run_dir.with_name(f"listops-{name}")
        config = grid.ROOT / "configs" / "listops.py"
        assert (folder / "arguments").read_text() == (
            f"--config={config}:{name} --config.seed=0 --config.num_seeds=2 --workdir={folder}\n"
        )
        assert records.provenance_of_run(folder / "seed-1") == HERE
        assert not list(folder.glob("seed-*/sweep.json"))
    rows = [cell_results.read_cell(cell) for cell in together]
    assert [(row["attention"], row["seed"]) for row in rows] == [
        ("softmax", 0),
        ("skyformer", 0),
        ("softmax", 1),
        ("skyformer", 1),
    ]
    for row in rows:
        assert (row["status"], row["attempts"], row["seeds_at_once"]) == ("finished", 1, 2)
        assert row["provenance"] == HERE
    assert rows[0]["seconds"] == rows[2]["seconds"] is not None


def test_seeds_trained_together_fail_stop_and_go_on(together):
    softmax, skyformer = together[0], together[1]
    tell(softmax, "fail")
    tell(skyformer, "wait")

    def stop(signals):
        ready = (skyformer.run_dir / "waiting").exists()
        if ready and (softmax.run_dir / "sweep.json").exists() and not signals:
            signals.append(signal.SIGTERM)

    assert len(train(together, then=stop)) == 4
    rows = [cell_results.read_cell(cell) for cell in together]
    assert [row["status"] for row in rows] == ["failed", "unfinished"] * 2
    assert [row["error"] for row in rows] == ["the disk is full", None] * 2
    log = skyformer.run_dir / "train.log"
    assert log.read_text() == "stopped after step 3; saved.\n"

    def to_train():
        rows = {cell.workdir: cell_results.read_cell(cell) for cell in together}
        return cell_results.to_train(together, rows)

    assert to_train() == together
    tell(softmax, "finish")
    tell(skyformer, "finish")
    train(to_train())
    rows = [cell_results.read_cell(cell) for cell in together]
    assert [(row["status"], row["attempts"]) for row in rows] == [("finished", 2)] * 4
    assert to_train() == []

    # An unfinished seed has its run trained again, but never over a refused result.
    (softmax.workdir / "eval_test.json").unlink()
    assert to_train() == [together[0], together[2]]
    (together[2].workdir / "eval_test.json").write_text("{")
    assert to_train() == []


def test_seeds_that_another_process_trains_together_are_waited_for(together, capsys):
    run = [together[0], together[2]]
    with (run[0].run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def look(_):
            if "another process is training it" in capsys.readouterr().err:
                finish(run[0])
                fcntl.flock(lock, fcntl.LOCK_UN)  # the process was killed before the second

        assert train(run, then=look) == run
    assert [cell_results.read_cell(cell)["status"] for cell in run] == ["finished"] * 2
    assert len((run[0].run_dir / "arguments").read_text().splitlines()) == 1


@pytest.mark.parametrize("flag", ["cell", "slurm"])
def test_together_is_refused_for_processes_of_one_cell(tmp_path, flag):
    value = {"cell": "0", "slurm": str(tmp_path / "s.sh")}[flag]
    status, stdout, stderr = ended(start(tmp_path, "--together", f"--{flag}={value}", seeds="0,1"))
    assert (status, stdout) == (2, "")
    assert stderr == (
        f"error: --{flag} trains each cell in its own process; leave out --together\n"
    )
    assert not list(tmp_path.iterdir())


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


def start(folder, *arguments, seeds="0", script="sweep"):
    fields = {**TINY, "data.dir": folder / "data"}
    del fields["attention.num_landmarks"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", f"experiments.paper.{script}"),
            "--configs=quickstart",
            "--attentions=softmax,skyformer",
            f"--seeds={seeds}",
            f"--dir={folder}/cells",
            f"--out={folder}/out.json",
            *(f"--set={field}={value}" for field, value in fields.items()),
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


def ended(process):
    stdout, stderr = process.communicate(timeout=500)
    return process.returncode, stdout, stderr


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


@pytest.mark.slow
def test_a_sweep_of_seeds_together_is_stopped_and_goes_on(tmp_path):
    arguments = ("--together", "--commit=abc")
    process = start(tmp_path, *arguments, seeds="0,1")
    metrics = tmp_path / "cells/quickstart-softmax/seed-1/metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, _, stderr = ended(process)
    assert status == 128 + signal.SIGTERM, stderr
    assert not list(tmp_path.glob("cells/*/seed-*/eval_test.json"))

    status, stdout, stderr = ended(start(tmp_path, *arguments, seeds="0,1"))
    assert status == 0, stderr
    assert "4 of 4 cells finished, 0 left" in stderr and "±" in stdout
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == [
        "quickstart-skyformer",
        "quickstart-softmax",
    ]
    log = (tmp_path / "cells/quickstart-softmax/train.log").read_text()
    assert "2 seeds at once" in log and "going on from the checkpoint" in log
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["commit"] == "abc" and len(result["cells"]) == 4
    for cell in result["cells"]:
        workdir = tmp_path / f"cells/quickstart-{cell['attention']}/seed-{cell['seed']}"
        evaluated = json.loads((workdir / "eval_test.json").read_text())
        assert (cell["status"], cell["accuracy"]) == ("finished", evaluated["accuracy"])
        assert (cell["seeds_at_once"], cell["provenance"]["commit"]) == (2, "abc")
        assert cell["attempts"] == (2 if cell["attention"] == "softmax" else 1)

    status, _, stderr = ended(start(tmp_path, *arguments, "--table", seeds="0,1"))
    assert (status, stderr) == (0, "4 of 4 cells are finished\n")
    changed = ("--set=train.learning_rate=0.01",)
    status, _, stderr = ended(start(tmp_path, *arguments, *changed, seeds="0,1"))
    assert status == 1
    assert "quickstart-softmax/seed-1: refused: " in stderr
