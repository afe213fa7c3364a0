"""What the benchmarks record, when they skip a measurement, and how they resume."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from scripts import import_script

from experiments.benchmarks import attention_cells, common_flags
from experiments.benchmarks.accelerator import numbers
from experiments.benchmarks.attention_cells import Settings
from skyformer_jax.errors import UserError

speed = import_script("benchmarks.speed")
SETTINGS = Settings(
    attentions=("softmax", "linformer"),
    dtypes=("float32",),
    passes=attention_cells.PASSES,
    batch=1,
    heads=2,
    head_dim=8,
    rounds=2,
)
HEADER = {"what": "a test", "commit": "abc", "device": "8 x cpu", "cores": 2}


def test_speed_of_attentions(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results" / "speed.json"
    result = speed.measure(SETTINGS, [16, 32], path, HEADER)
    assert json.loads(path.read_text()) == result
    assert [(cell["length"], cell["pass"], cell["attention"]) for cell in result["cells"]] == [
        (length, kind, name)
        for length in (16, 32)
        for kind in SETTINGS.passes
        for name in SETTINGS.attentions
    ]
    for cell in result["cells"]:
        assert len(cell["seconds"]) == 2 and min(cell["seconds"]) > 0
        assert cell["median_seconds"] == np.mean(cell["seconds"])
        assert cell["compile_seconds"] > 0
    cell = result["cells"][-1]
    inputs = attention_cells.make_inputs(SETTINGS, 32, "float32")
    function, arguments = attention_cells.make_call("linformer", "gradients", SETTINGS, inputs)
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert cell["temporaries_bytes"] == memory.temp_size_in_bytes
    # float32 gradients of query, key and value, and of both projections to 128 features.
    assert (
        4 * (3 * 32 * 2 * 8 + 2 * 32 * 128) <= cell["output_bytes"] == memory.output_size_in_bytes
    )

    attention_cells.plot(result, "a title", path.with_suffix(".png"))
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "linformer" in attention_cells.tables(result["cells"])

    # Limits: a slow cell is timed once, longer ones are skipped, and one that needs too much
    # memory is never run.
    hasty = dataclasses.replace(SETTINGS, passes=("forward",), max_seconds=0)
    for cell in attention_cells.measure_length(hasty, 16, []):
        assert len(cell["seconds"]) == 1
    for cell in attention_cells.measure_length(hasty, 32, result["cells"][:4]):
        assert cell["skipped"].startswith("length 16 took")
        assert "temporaries_bytes" in cell and "seconds" not in cell
    narrow = dataclasses.replace(SETTINGS, passes=("gradients",), max_temporaries=1)
    for cell in attention_cells.measure_length(narrow, 16, []):
        assert "GiB of temporaries" in cell["skipped"] and cell["temporaries_bytes"] > 1
        assert "seconds" not in cell
    # Without cuDNN, the cell records a reason instead of raising.
    flash = dataclasses.replace(SETTINGS, attentions=("flash",), passes=("forward",))
    (cell,) = attention_cells.measure_length(flash, 16, [])
    assert "cuDNN" in cell["skipped"]

    # Resuming measures only missing lengths, and only if the code and the settings are the same.
    measured = []

    def record(settings, length, shorter):
        measured.append((length, len(shorter)))
        return []

    monkeypatch.setattr(attention_cells, "measure_length", record)
    speed.measure(SETTINGS, [16, 32, 64], path, HEADER)
    assert measured == [(64, 8)]
    for settings, header, said in (
        (SETTINGS, {**HEADER, "commit": "def"}, "other values of commit"),
        (dataclasses.replace(SETTINGS, rounds=3), HEADER, "other values of settings"),
    ):
        path.write_text(json.dumps(result))
        measured.clear()
        capsys.readouterr()
        speed.measure(settings, [16, 32], path, header)
        assert measured == [(16, 0), (32, 0)]
        assert said in capsys.readouterr().err
    path.write_text(json.dumps({**result, "commit": "abc-dirty"}))
    measured.clear()
    speed.measure(SETTINGS, [16], path, {**HEADER, "commit": "abc-dirty"})
    assert measured == [(16, 0)]


def test_lists_of_positive_integers():
    values = flags.FlagValues()
    flag = flags.DEFINE_list("lengths", "64,16,64", "Tokens.", flag_values=values)
    values.mark_as_parsed()
    assert common_flags.integers(flag) == [16, 64]
    with pytest.raises(UserError, match="integers of at most 32; got 64,16,64"):
        common_flags.integers(flag, 32)
    for wrong in ([], ["0", "1"], ["many"]):
        values.lengths = wrong
        with pytest.raises(UserError, match="--lengths must be positive integers; got"):
            common_flags.integers(flag)


def test_exponents_of_power_laws():
    lengths = [1024, 4096, 8192, 16384]
    for power in (0.0, 1.0, 2.0):
        values = [1e9] + [3e-5 * n**power for n in lengths[1:]]  # the first is left out of the fit
        np.testing.assert_allclose(attention_cells.fit_exponent(lengths, values), power, atol=1e-12)
    assert attention_cells.fit_exponent(lengths[:3], values[:3]) is None
    assert attention_cells.fit_exponent(lengths[1:], [0, 1, 2]) is None
    cells = [
        {
            "attention": "softmax",
            "dtype": "float32",
            "pass": "forward",
            "length": n,
            "batch": 65536 // n,
            "temporaries_bytes": (65536 // n) * n**2,
            **({"median_seconds": 7 * 65536 * n} if n < 16384 else {"skipped": "for its time"}),
        }
        for n in lengths
    ]
    (row,) = attention_cells.exponents(cells)
    assert row["time"] is None  # per sequence; two points are too few to fit
    np.testing.assert_allclose(row["temporaries"], 2)


def _accelerator(tmp_path, *flags, xla_flags=""):
    """Runs a tiny accelerator benchmark on the CPU; returns its JSON result and its stdout."""
    root = Path(__file__).resolve().parent.parent
    out = tmp_path / "accelerator.json"
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator"]
    done = subprocess.run(
        [*command, "--small", f"--out={out}", *flags],
        cwd=root,
        env={**os.environ, "XLA_FLAGS": xla_flags},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_accelerator_command_measures(tmp_path):
    sections = "numbers,gaussian,attention,steps"
    result, shown = _accelerator(tmp_path, "--minutes=60", f"--sections={sections}")
    checked = [row for row in result["numbers"]["rows"] if row["attention"] != "flash"]
    bounds = {"float32": 2e-5, "bfloat16": 1e-1}
    assert {row["attention"] for row in checked} == {*attention_cells.ATTENTIONS} - {"flash"}
    assert all(max(row["errors"].values()) < bounds[row["dtype"]] for row in checked)
    # Computed by hand for 4 sequences of 128 tokens, 2 heads of dimension 32 and 128 landmarks.
    forward, gradients = result["gaussian"]["rows"][:2]
    pairs, bytes_of_array = 4 * 2 * 128 * 128, 4 * (4 * 2 * 128 * 32)
    assert forward["operations"] == pairs * (2 * 32 + 2 * 32)
    assert forward["bytes"] == 4 * bytes_of_array  # query, key, value and output
    assert gradients["operations"] == pairs * 7 * 2 * 32
    assert gradients["bytes"] == 8 * bytes_of_array
    assert all(0 < row["shares"]["float32"] < 1 for row in result["gaussian"]["rows"])
    timed = {cell["attention"] for cell in result["attention"]["cells"] if "seconds" in cell}
    assert timed >= {"skyformer", "softmax", "kernelized", "kernelized-dense"}
    steps = result["steps"]["rows"]
    assert len(steps) == 20  # 5 tasks x (Skyformer, Skyformer with three seeds, two more)
    assert all(row["steps_per_second"] > 0 for row in steps)
    assert "steps/s" in shown
    assert (tmp_path / "accelerator.png").exists()


@pytest.mark.slow
def test_accelerator_command_trains_and_goes_on(tmp_path):
    """With no time left nothing starts; with time it trains; a third call finds it finished."""
    flags = ["--sections=training", "--run=listops:skyformer", f"--run_dir={tmp_path / 'runs'}"]
    flags += [f"--data_dir={tmp_path / 'data'}", "--num_seeds=2", "--commit=abc"]
    result, _ = _accelerator(tmp_path, *flags, "--minutes=0")
    assert result["training"].get("rows", []) == []
    result, shown = _accelerator(tmp_path, *flags, "--minutes=60")
    (row,) = result["training"]["rows"]
    assert result["commit"] == "abc"
    assert row["step"] == row["num_steps"] == 20
    assert not row["full"]
    assert [x["step"] for x in row["validation"]["seed-1"]] == [10, 20]
    assert f"test {100 * row['test']['accuracy']:.2f} %" in shown
    again, _ = _accelerator(tmp_path, *flags, "--minutes=60")
    assert again["training"]["rows"] == [{**row, "seconds": 0.0}]


def test_training_leaves_a_kernel_that_fails_or_is_wrong():
    """Each attention is judged by itself.

    Attentions that were not checked, or that have no kernels to choose from, are left out.
    """

    def row(attention, errors=None, dtype="float32"):
        found = {"skipped": "XlaRuntimeError"} if errors is None else {"errors": errors}
        return {"attention": attention, "dtype": dtype, **found}

    good, bad = {"out": 1e-3, "d_key": 2e-3}, {"out": 1e-3, "d_key": 0.3}
    rows = [row("softmax", bad), row("softmax", good), row("skyformer", good), row("kernelized")]
    rows += [row("skyformer", bad, "bfloat16"), row("flash"), row("bigbird", bad)]
    assert numbers.implementations(rows) == {
        "softmax": "chunked",
        "skyformer": "auto",
        "kernelized": "chunked",
    }
    not_a_number = {"out": 1e-3, "d_key": float("nan")}
    assert numbers.implementations([row("skyformer", not_a_number)]) == {"skyformer": "chunked"}


@pytest.mark.slow
def test_a_section_whose_process_dies_costs_itself_alone(tmp_path):
    flags = ["--sections=numbers,training", "--run=listops:skyformer", "--minutes=0"]
    result, _ = _accelerator(tmp_path, *flags, xla_flags="--xla_no_such_flag=1")
    assert "ended with status" in result["numbers"]["error"]
    assert "error" not in result["training"]
