"""The optimizer and its schedule, against the paper's definition."""

import jax.numpy as jnp
import numpy as np
from run_on import run_on
from test_model import tiny_config

from skyformer_jax.training.optimizer import make_schedule


def test_schedule_is_the_one_cycle_of_the_paper():
    """Linear warm-up to the peak in warmup_steps, then linear decay to peak / 25e4."""
    config = tiny_config()
    config.train.update({"learning_rate": 2e-4, "warmup_steps": 80, "num_steps": 1000})
    schedule = make_schedule(config.train)
    for step, expected in (
        (0, 2e-4 / 25),
        (40, (2e-4 / 25 + 2e-4) / 2),
        (80, 2e-4),
        (540, (2e-4 + 2e-4 / 25e4) / 2),
        (1000, 2e-4 / 25e4),
    ):
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-4)
    config.train.warmup_steps = 0
    np.testing.assert_allclose(make_schedule(config.train)(0), 2e-4, rtol=1e-6)


def test_gradients_are_clipped_by_value():
    config = tiny_config()
    optimizer = run_on(config).optimizer
    params = {"w": jnp.ones(3)}
    small, large = ({"w": jnp.array([1.0, -1.0, 1.0]) * size} for size in (1, 100))
    updates = [optimizer.update(g, optimizer.init(params), params)[0]["w"] for g in (small, large)]
    np.testing.assert_array_equal(*updates)
