"""The report: its statistics and verdicts, and that it says only what the JSON files say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import HEADER

from experiments.paper import published
from experiments.paper.report import __main__ as report
from experiments.paper.report import claims, statistics, tables
from skyformer_jax.attention import NAMES
from skyformer_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ORIGIN = {**HEADER, "versions": {"jax": "0.10.2"}}


def cell(config, attention, seed, accuracy, status="finished", departures=None):
    return {
        "config": config,
        "attention": attention,
        "seed": seed,
        "status": status,
        "error": "lost power" if status == "failed" else None,
        "accuracy": accuracy,
        "examples": 400,
        "task": config,
        "floors": {"commonest label": 0.5},
        "data": {"checksum": "0123"},
        "departures": departures or {},
    }


def table1(**accuracies):
    cells = [
        cell("text", name, seed, accuracy)
        for name, of_seeds in accuracies.items()
        for seed, accuracy in enumerate(of_seeds)
    ]
    return {**ORIGIN, "cells": cells}


def row(config, attention, **values):
    return {"config": config, "attention": attention, "departures": {}, **values}


def verdict(text, **results):
    (found,) = [v for v in claims.judge(results) if text in v.claim]
    return found


def test_what_the_paper_printed():
    averages = "57.37 58.56 58.93 54.69 53.73 58.00 58.99 59.05 59.39"
    order = "softmax kernelized nystromformer linformer informer performer reformer bigbird"
    for name, average in zip([*order.split(), "skyformer"], averages.split(), strict=True):
        mean = np.mean(list(published.ACCURACY[name].values()))
        np.testing.assert_allclose(mean, float(average), atol=0.0051)
    for table in (published.ACCURACY, published.HOURS, published.MEMORY):
        assert set(table) == set(NAMES)


def test_the_origin_is_that_of_every_run():
    result = table1(softmax=[0.6, 0.62, 0.64, 0.66])
    assert tables.origin(result) == "Commit abc; 8 x cpu (2 cores); jax 0.10.2."
    here, there = ORIGIN | {"commit": "bcd"}, ORIGIN | {"commit": "def", "device": "1 x gpu"}
    for cell, origin in zip(result["cells"], (here, ORIGIN, there, there), strict=True):
        cell["provenance"] = origin
    result["cells"][3].update(status="failed", provenance=None)
    assert tables.origin(result) == (
        "Commit abc, bcd; 8 x cpu (2 cores); jax 0.10.2. Commit def; 1 x gpu (2 cores); jax 0.10.2."
    )


def test_standard_errors_of_accuracies():
    found = statistics.accuracies(table1(softmax=[0.6, 0.62], skyformer=[0.7, 0.74, 0.72]))
    # The sums of squares are 2 and 8, with 1 and 2 degrees of freedom.
    deviation = math.sqrt(10 / 3)
    expected = statistics.Estimate(61, deviation / math.sqrt(2), 2)
    np.testing.assert_allclose(found["text"]["softmax"], expected)
    expected = statistics.Estimate(72, deviation / math.sqrt(3), 3)
    np.testing.assert_allclose(found["text"]["skyformer"], expected)
    difference = statistics.minus(found["text"]["skyformer"], found["text"]["softmax"])
    np.testing.assert_allclose(difference, [11, deviation * math.sqrt(1 / 2 + 1 / 3), 2])
    # With one seed, the standard error is that of 400 examples.
    found = statistics.accuracies(table1(softmax=[0.6]))
    np.testing.assert_allclose(found["text"]["softmax"], [60, 100 * math.sqrt(0.6 * 0.4 / 400), 1])


def test_instability_ratios():
    rows = [
        row("text", "softmax", seed=0, instability=[1.0, 3.0]),
        row("text", "softmax", seed=1, instability=[2.0, 2.0]),
        row("text", "skyformer", seed=0, instability=[1.0, 1.0]),
        row("text", "skyformer", seed=1, instability=[1.0, 2.0]),
        row("text", "kernelized", seed=1, instability=[1.0, 2.0]),
        row("retrieval", "softmax", seed=0, skipped="no data"),
    ]
    found = statistics.instability_ratios({"rows": rows})
    assert found.keys() == {"text"} and found["text"].keys() == {"skyformer", "kernelized"}
    np.testing.assert_allclose(found["text"]["skyformer"], [0.625, 0.125, 2])
    # With one seed, the ratios of the two steps are 0.5 and 1.
    np.testing.assert_allclose(found["text"]["kernelized"], [0.75, 0.25, 1])


def test_verdicts_follow_the_figures():
    matches = "Skyformer at least matches softmax"
    assert verdict(matches).status == claims.NOT_RUN
    assert verdict(matches, table1=table1(softmax=[0.6, 0.61])).status == claims.NOT_RUN
    close = table1(softmax=[0.6, 0.602], skyformer=[0.599, 0.601])
    assert verdict(matches, table1=close).status == claims.CONFIRMED
    assert verdict(matches, table1=close).runs == claims.FULL
    noisy = table1(softmax=[0.55, 0.65], skyformer=[0.56, 0.66])
    assert verdict(matches, table1=noisy).status == claims.NOT_CONFIRMED
    worse = table1(softmax=[0.6, 0.602], skyformer=[0.58, 0.582])
    assert verdict(matches, table1=worse).status == claims.NOT_CONFIRMED
    assert "-2.00" in verdict(matches, table1=worse).evidence
    worse["cells"][0]["departures"] = {"train.num_steps": [50_000, 10]}
    assert verdict(matches, table1=worse).runs == claims.REDUCED

    # Runs that are closer to the paper's decide, and buckets only change the padding.
    fast = close | {"variant": "fast"}
    fast["cells"][0]["departures"] = {"data.buckets": [[8], [16]]}
    found = verdict(matches, table1=worse, fast=fast)
    assert (found.status, found.runs) == (claims.CONFIRMED, claims.FAST)
    del worse["cells"][0]["departures"]["train.num_steps"]
    found = verdict(matches, table1=worse, fast=fast)
    assert (found.status, found.runs) == (claims.NOT_CONFIRMED, claims.FULL)
    assert verdict(matches, table1=table1(softmax=[0.6]), fast=fast).runs == claims.FAST

    for scores, status in (([1.0, 1.0], claims.CONFIRMED), ([3.0, 3.0], claims.NOT_CONFIRMED)):
        rows = [
            row("text", "softmax", seed=0, instability=[2.0, 2.0]),
            row("text", "skyformer", seed=0, instability=[1.0, 1.0]),
            row("image", "softmax", seed=0, instability=[2.0, 2.0]),
            row("image", "skyformer", seed=0, instability=scores),
        ]
        for i, measured in enumerate(rows):
            measured |= {"instability_with_noise": [100.0 + 10 * i] * 2, "batch_size": 4}
            measured["examples"] = 4 - i // 3
        found = verdict("Skyformer is more stable", stability={"rows": rows})
        assert found.status == status
        assert found.evidence.endswith("in f text 1.10, image 1.08")
        assert found.runs == claims.REDUCED  # the last row measured three of its four examples
    assert statistics.noise_of_softmax({"rows": rows}) == {"text": 50, "image": 60}

    def errors(*values):
        rows = [
            row("", "skyformer", weights="initialised", length=64, num_features=d)
            | {"relative_error": {"median": value}}
            for d, value in zip((16, 32), values, strict=True)
        ]
        rival = rows[1] | {"attention": "performer", "relative_error": {"median": 0.5}}
        return {"rows": [*rows, rival], "features": [16, 32]}

    for text in ("error falls", "error is the least"):
        assert verdict(text, figure1=errors(0.3, 0.2)).status == claims.CONFIRMED
        assert verdict(text, figure1=errors(0.3, 0.6)).status == claims.NOT_CONFIRMED

    def curves(*accuracies):
        return {
            "rows": [
                row("text", name, seed=0)
                | {
                    "validation": [
                        {"seconds": pace * (i + 1), "accuracy": a, "loss": 1 - a}
                        for i, a in enumerate(of_name)
                    ]
                }
                for name, pace, of_name in (
                    ("softmax", 10, (0.5, 0.6, 0.58)),
                    ("skyformer", 5, accuracies),
                )
            ]
        }

    found = verdict("in less time", figure2=curves(0.5, 0.55, 0.6))
    assert (found.status, found.evidence) == (
        claims.CONFIRMED,
        "text 60.0 %: 0.75 of the time",
    )
    assert verdict("in less time", figure2=curves(0.5, 0.5, 0.5)).status == claims.NOT_CONFIRMED


def test_the_best_average_is_of_the_tasks_that_all_have():
    of_text = {name: [0.6] for name in NAMES} | {"skyformer": [0.61]}
    result = table1(**of_text)
    average = "best average accuracy"
    assert verdict(average, fast=result).status == claims.CONFIRMED
    result["cells"].append(cell("image", "softmax", 0, 0.9))
    found = verdict(average, fast=result)
    assert found.status == claims.CONFIRMED
    assert found.evidence.startswith("skyformer 61.00, ") and "mean of text)" in found.evidence
    result["cells"] += [cell("image", name, 0, 0.5) for name in NAMES if name != "softmax"]
    assert verdict(average, fast=result).status == claims.NOT_CONFIRMED
    assert verdict(average, fast=table1(skyformer=[0.6])).status == claims.NOT_RUN


def test_the_table_shows_every_figure():
    result = table1(softmax=[0.6, 0.62])
    result["cells"].append(cell("image", "softmax", 0, None, "failed"))
    result["cells"][0]["departures"] = {"train.num_steps": [50_000, 10]}
    text = tables.table1(result)
    assert "| `softmax` | 61.95 | 61.00 | -0.95 | 1.00 | 2 |" in text
    assert "`train.num_steps` 50,000 → 10; seeds 3 → 2" in text
    assert "### image\n\nNot yet run. lost power" in text
    assert "### retrieval\n\nNot yet run." in text
    for row in result["cells"]:
        row.update(variant="fast", num_steps=1000, batch_size=16)
    text = tables.table1(result)
    said = (
        "Variant fast, which `configs/text.py` describes: 1,000 steps of 16 instead of 50,000 steps"
    )
    assert f"{said}; `train.num_steps` 50,000 → 10." in text
    assert "Reduced" not in text


def test_nothing_measured_is_nothing_claimed():
    text = report.render({})
    assert text.count("**not yet run**") == len(claims.CLAIMS)
    assert text.count("Not yet run: `python -m experiments.paper.") == len(report.SECTIONS)
    for section in report.SECTIONS.values():
        assert (ROOT / "experiments/paper" / f"{section.command.split()[0]}.py").exists()
    assert "confirmed**" not in text


def test_the_report_is_that_of_the_results():
    """results/REPORT.md is up to date with the JSON files beside it."""
    assert (ROOT / "results/REPORT.md").read_text() == report.render(
        report.read_results(ROOT / "results")
    )


@pytest.mark.parametrize("name", report.SECTIONS)
def test_pictures(name, tmp_path):
    path = ROOT / "results" / f"{name}.json"
    report.SECTIONS[name].draw(json.loads(path.read_text()), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_command_and_its_errors(tmp_path):
    def call(folder):
        command = [sys.executable, "-m", "experiments.paper.report", f"--results={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "speed.json").write_text(json.dumps({**ORIGIN, "what": "a speed"}))
    assert call(tmp_path) == (0, f"{tmp_path}/REPORT.md\n")
    assert "| [speed](speed.json) | a speed | abc |" in (tmp_path / "REPORT.md").read_text()
    (tmp_path / "table1.json").write_text("{")
    status, output = call(tmp_path)
    assert status == 2 and output.startswith(f"error: {tmp_path}/table1.json is damaged")
    assert call(tmp_path / "none")[0] == 2
    earlier = json.loads((ROOT / "results/stability.json").read_text())
    for measured in earlier["rows"]:
        del measured["instability_with_noise"]
    with pytest.raises(UserError, match=r"^stability\.json has no 'instability_with_noise'"):
        report.render({"stability": earlier})
