"""The paper's optimizer and learning-rate schedule."""

import ml_collections
import optax


def make_schedule(train: ml_collections.ConfigDict) -> optax.Schedule:
    """Returns the one-cycle schedule with linear annealing of the paper's runs.

    The learning rate rises linearly from peak / 25 to the peak in warmup_steps, then falls linearly
    to peak / 250,000 at num_steps.

    Args:
      train: config.train, with learning_rate (the peak), warmup_steps and num_steps.
    """
    peak, warmup = train.learning_rate, train.warmup_steps
    fall = optax.linear_schedule(peak, peak / 25e4, train.num_steps - warmup)
    if not warmup:
        return fall
    return optax.join_schedules([optax.linear_schedule(peak / 25, peak, warmup), fall], [warmup])


def make_optimizer(
    schedule: optax.Schedule, *, weight_decay: float
) -> optax.GradientTransformation:
    """Returns AdamW (b1 0.9, b2 0.999, eps 1e-6) on gradients clipped by value at 1."""
    return optax.chain(optax.clip(1.0), optax.adamw(schedule, eps=1e-6, weight_decay=weight_decay))
