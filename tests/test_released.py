"""Released checkpoints: made from a run, loaded in two lines, evaluated to the same accuracy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_runs import TINY, run, train_command

import skyformer_jax
from configs import quickstart
from skyformer_jax import training
from skyformer_jax.errors import UserError
from skyformer_jax.training import checkpoints
from skyformer_jax.training.config import read
from skyformer_jax.training.evaluation import evaluation_mesh
from skyformer_jax.training.run import make_run
from skyformer_jax.training.state import state_spec

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def released(tmp_path_factory, data_dir):
    """The workdir of a finished run and the folder of the checkpoint released from it."""
    folder = tmp_path_factory.mktemp("released")
    config = quickstart.get_config()
    fields = {"data.dir": str(data_dir), "train.num_steps": 20, "train.eval_every": 10}
    config.update_from_flattened_dict({**TINY, **fields})
    training.train(config, folder / "run")
    training.release(folder / "run", folder / "model", {"seconds": 1})
    return folder / "run", folder / "model"


def test_a_released_checkpoint_is_loaded_and_gives_its_accuracy_again(released, data_dir, tmp_path):
    workdir, folder = released
    model, variables = skyformer_jax.load_pretrained(folder)
    tokens = np.arange(20)[None] % 15 + 1
    logits = jax.jit(model.apply)(variables, tokens, np.ones(tokens.shape, bool))
    config = read(workdir / "config.json")
    trained = make_run(config, evaluation_mesh(config))
    step = checkpoints.find(workdir / "checkpoints", "best")
    state, _ = checkpoints.restore(workdir / "checkpoints", step, state_spec(trained))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], state.params)
    expected = jax.jit(trained.model.apply)(state.variables, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_array_equal(logits, expected)

    tested = json.loads((workdir / "eval_test.json").read_text())
    result = training.evaluate_released(folder, data_dir=str(data_dir), out=tmp_path / "again.json")
    assert result["accuracy"] == tested["accuracy"] == result["released"]
    assert result["confusion"] == tested["confusion"]
    assert json.loads((tmp_path / "again.json").read_text())["accuracy"] == tested["accuracy"]
    assert "as released" in training.result_table(result)


@pytest.mark.slow
def test_what_cannot_be_released_or_loaded_is_named(released, tmp_path):
    workdir, folder = released
    with pytest.raises(UserError, match=r"has no config\.json"):
        skyformer_jax.load_pretrained(tmp_path)
    other = tmp_path / "run"
    shutil.copytree(workdir, other)
    (other / "eval_test.json").unlink()
    with pytest.raises(UserError, match="evaluate first"):
        training.release(other, tmp_path / "out", {})
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    whole = (damaged / "parameters.npz").read_bytes()
    (damaged / "parameters.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        skyformer_jax.load_pretrained(damaged)
    np.savez(damaged / "parameters.npz", code=np.array([print], object))
    with pytest.raises(UserError, match="is damaged"):
        skyformer_jax.load_pretrained(damaged)


@pytest.mark.slow
def test_training_starts_from_a_released_checkpoint(released, data_dir, tmp_path):
    """Takes all parameters but head_out, since this model has another number of classes."""
    _, folder = released
    fields = {"train.num_steps": 3, "train.warmup_steps": 0, "train.learning_rate": 1e-9}
    command = train_command(tmp_path / "run", data_dir, **fields)
    command += [f"--config.train.start_from={folder}", "--config.model.num_classes=11"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "new: head_out/kernel, head_out/bias" in done.stderr.replace(
        "bias, head_out/kernel", "kernel, head_out/bias"
    )
    config = read(tmp_path / "run" / "config.json")
    state, _ = checkpoints.restore(
        tmp_path / "run" / "checkpoints", 3, state_spec(make_run(config, evaluation_mesh(config)))
    )
    _, variables = skyformer_jax.load_pretrained(folder)
    for name in ("token_embedding", "block_0", "head_hidden"):
        for x, y in zip(
            jax.tree.leaves(state.params[name]),
            jax.tree.leaves(variables["params"][name]),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, atol=1e-6)


CHECKPOINTS = sorted(path.parent for path in (ROOT / "checkpoints").glob("*/result.json"))


def test_there_are_released_models_and_they_are_small():
    assert CHECKPOINTS
    size = sum(path.stat().st_size for path in (ROOT / "checkpoints").rglob("*") if path.is_file())
    assert size < 8e6


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_released_models_are_what_the_list_says(folder):
    model, variables = skyformer_jax.load_pretrained(folder)
    result = json.loads((folder / "result.json").read_text())
    tokens = np.ones((1, 64), int)
    logits = jax.jit(model.apply)(variables, tokens, tokens > 0)
    assert logits.shape == (1, model.num_classes)
    assert np.isfinite(logits).all()
    parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert parameters == result["parameters"]
    page = (ROOT / "docs/models.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{folder.name}`"))
    assert f"{100 * result['test']['accuracy']:.2f} %" in row
    assert f"{parameters:,}" in row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["listops-skyformer"])
def test_a_released_model_gives_its_test_accuracy_again(name, tmp_path):
    """Generates the data of the whole task and evaluates on them."""
    out = tmp_path / "again.json"
    command = [sys.executable, "eval.py", f"--checkpoint_dir=checkpoints/{name}"]
    command += [f"--data_dir={tmp_path / 'data'}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["accuracy"] == result["released"]
