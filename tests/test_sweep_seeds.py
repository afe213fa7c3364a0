"""Sweeps: seeds trained together (--together), and cells of several commands (--add)."""

import fcntl
import json
import signal
import time

import pytest
from sweeps import HERE, ended, finish, make, prepare, put_stub, start, tell, train

from experiments import records
from experiments.paper import cell_results, grid
from skyformer_jax.errors import UserError
from skyformer_jax.training.config import stored
from skyformer_jax.training.workdir import seed_runs

TOGETHER = {"configs": ["listops"], "attentions": ["softmax", "skyformer"], "together": True}


@pytest.fixture
def together(tmp_path, monkeypatch):
    """Four cells in two runs of two seeds, which the stub is told to finish."""
    put_stub(tmp_path, monkeypatch)
    return prepare(make(tmp_path / "sweep", **TOGETHER))


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
        "| `skyformer` | 25.00 ± 0.00 | 75.00 |",
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
