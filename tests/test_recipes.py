"""The table of recipes, made from a workdir as train.py writes it."""

import json

from scripts import import_script
from test_reproduction import give

from experiments.paper.grid import parse_config
from skyformer_jax.training import config as configs
from skyformer_jax.training.workdir import SeedRun, seed_runs

recipes = import_script("paper.recipes")


def test_a_row_says_what_a_run_reached_and_when(tmp_path):
    config = parse_config(["--config=configs/text.py:skyformer,fast", "--config.seed=3"])
    (tmp_path / "config.json").write_text(json.dumps(configs.stored(config)))
    entries = []
    for step, accuracy in ((100, 0.6), (200, 0.65), (300, 0.64)):
        train = {"step": step, "split": "train", "examples_per_second": 32.0}
        entries += [train, {"step": step, "split": "validation", "accuracy": accuracy}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    row = recipes.row_of(tmp_path)
    assert row["curve"] == [(100, 50.0, 0.6), (200, 100.0, 0.65), (300, 150.0, 0.64)]
    assert (row["best_validation"], row["test"]) == (0.65, None)
    assert (row["paper"], row["seconds_to_paper"]) == (64.7, 100.0)
    assert row["departures"]["train.learning_rate"] == (1e-4, config.train.learning_rate)
    recipes.plot([row], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_run_of_several_seeds_has_a_row_for_each(tmp_path, monkeypatch):
    arguments = ["--config=configs/text.py:skyformer,small", "--config.num_seeds=2"]
    run_dir = tmp_path / "runs" / "text-skyformer-small"
    config = parse_config(arguments)
    for one in (SeedRun(config, run_dir), *seed_runs(config, run_dir)):
        one.workdir.mkdir(parents=True)
        (one.workdir / "config.json").write_text(json.dumps(configs.stored(one.config)))
        entry = {"step": 100, "split": "train", "examples_per_second": 32.0}
        scores = {"step": 100, "split": "validation", "accuracy": 0.6}
        (one.workdir / "metrics.jsonl").write_text(f"{json.dumps(entry)}\n{json.dumps(scores)}")
    out = tmp_path / "recipes.json"
    give(monkeypatch, recipes, _RUNS=f"{run_dir.parent}/*", _OUT=str(out))
    recipes.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["run"], row["seed"], row["best_validation"]) for row in rows] == [
        ("text-skyformer-small/seed-0", 0, 0.6),
        ("text-skyformer-small/seed-1", 1, 0.6),
    ]
