"""Scores and the confidence intervals in results."""

import numpy as np

from skyformer_jax.training.evaluation import score
from skyformer_jax.training.results import wilson_interval


def test_score_and_interval():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = score(logits, np.array([0, 2]))
    assert scores["accuracy"] == 0.5
    expected = -np.log(probabilities[[0, 1], [0, 2]]).mean()
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-12)
    low, high = wilson_interval(0.5, 100)
    np.testing.assert_allclose([low, high], [0.4038, 0.5962], atol=1e-4)  # published tables
