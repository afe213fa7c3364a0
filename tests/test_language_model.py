"""The language model: packed documents, sampling, and the example script."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from skyformer_jax.language_model import LanguageModel, generate

ROOT = Path(__file__).parent.parent
SMALL = {"num_layers": 2, "width": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
OPTIONS = {"skyformer": {"landmarks": "learned", "num_landmarks": 4, "normalize": True}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skyformer", "softmax"])
def test_sampling_goes_on_as_the_model_predicts(name):
    """At temperature 0, each sampled token is the most likely one of the parallel form."""
    model = LanguageModel(name, OPTIONS.get(name, {}), vocab_size=20, **SMALL)
    prompt = np.random.default_rng(0).integers(0, 20, (2, 9))
    variables = jax.jit(model.init)(jax.random.key(0), prompt)
    tokens = generate(model, variables, prompt, 6, jax.random.key(1), temperature=0)
    whole = np.concatenate([prompt, tokens], axis=1)
    likeliest = np.argmax(jax.jit(model.apply)(variables, whole), axis=-1)
    np.testing.assert_array_equal(tokens, likeliest[:, 8:-1])


def test_documents_of_a_packed_sequence_do_not_see_each_other():
    model = LanguageModel("skyformer", OPTIONS["skyformer"], vocab_size=20, **SMALL)
    tokens = np.random.default_rng(0).integers(0, 20, (1, 12))
    segment_ids = np.array([[0] * 5 + [1] * 7])
    init = jax.jit(model.init_with_output)
    logits, variables = init(jax.random.key(0), tokens, segment_ids=segment_ids)
    alone = jax.jit(model.apply)(variables, tokens[:, 5:])
    np.testing.assert_allclose(logits[:, 5:], alone, atol=1e-5)


@pytest.mark.slow
def test_the_example_trains_samples_and_times(tmp_path):
    (tmp_path / "text.txt").write_text("one film after another is a film about a film. " * 200)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "experiments.language_model", "--attentions=skyformer"]
    command += [f"--text={tmp_path}", "--small", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    first, second = (one["state_bytes"] for one in row["decoding"])
    assert first == second
    assert 0 < row["bits_per_byte"] < 9
    assert "bits per byte" in done.stdout
