"""Whole runs with non-finite losses and gradients: reported, stopped or skipped."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_runs import TINY

from configs import quickstart
from skyformer_jax import training
from skyformer_jax.errors import UserError
from skyformer_jax.training import loop
from skyformer_jax.training.recorder import check_finite
from skyformer_jax.training.workdir import SeedRun

BAD = 11


def tiny_config(data_dir, **changes):
    config = quickstart.get_config()
    fields = {
        **TINY,
        "data.dir": str(data_dir),
        "train.num_steps": 16,
        "train.eval_every": 8,
        "train.batch_size": 64,
        **changes,
    }
    config.update_from_flattened_dict(fields)
    return config


def corrupt(monkeypatch, *bad_steps):
    """Puts a token outside the vocabulary, whose embedding is NaN, into batches of bad_steps."""
    original = loop.training_batches

    def batches(*arguments, first_step=0, **options):
        stream = original(*arguments, first_step=first_step, **options)
        for step, batch in enumerate(stream, first_step + 1):
            if step in bad_steps:
                batch.tokens[3, 0] = 255
            yield batch

    monkeypatch.setattr(loop, "training_batches", batches)


@pytest.mark.slow
def test_bad_batches_are_skipped_and_counted(tmp_path, data_dir, monkeypatch, capsys):
    config = tiny_config(
        data_dir, **{"train.non_finite": "skip", "train.statistics": True, "model.remat": True}
    )
    corrupt(monkeypatch, BAD, BAD + 2)
    result = training.train(config, tmp_path / "run")
    assert np.isfinite(result["loss"])
    assert f"step {BAD}, seed 0; 2 step(s) up to 16 skipped" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (e for e in map(json.loads, lines) if e["split"] == "train")
    assert (first["step"], second["step"]) == (8, 16)
    assert "skipped" not in first and second["skipped"] == 2
    for entry in (first, second):
        assert 0 < entry["gradient_norm"] < 100 and 0 < entry["block_0_rms"] < 100
        assert 0 < entry["block_0_nystrom_residual"] < 1


def test_a_run_of_nothing_but_bad_steps_stops_in_any_case(tmp_path):
    sums = {"skipped": np.array([8]), "first_skipped": np.array([9]), "examples": np.array([0.0])}
    seeds = [SeedRun(ConfigDict({"seed": 4}), tmp_path)]
    with pytest.raises(UserError, match=r"step 9, seed 4;.*none of the 8 steps up to 16"):
        check_finite("skip", sums, 16, seeds, report=True)
    some = jax.tree.map(lambda x: x * 0 + 1, sums)
    check_finite("skip", some, 16, seeds, report=True)
