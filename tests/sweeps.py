"""Grids, finished cells, a stand-in for train.py, and commands, for the tests of sweeps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from test_runs import TINY

from experiments.paper import grid, workers
from skyformer_jax.training.config import read
from skyformer_jax.training.results import config_digest, wilson_interval

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}
HERE = {"commit": "abc", "device": "1 x cpu"}


def make(folder, configs=("listops", "text"), attentions=("softmax",), seeds="01", **options):
    options = {"variant": "", "overrides": [], **options}
    return grid.make_grid(configs, attentions, list(seeds), directory=folder, **options)


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


def put_stub(tmp_path, monkeypatch):
    """Puts the stub in the place of train.py."""
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
