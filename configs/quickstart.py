"""Skyformer on short ListOps expressions: the whole system in a few minutes on two CPU cores."""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """argument: "attention"."""
    attention, _ = common.parse(argument)
    config = common.paper_config("listops_small", attention, max_length=48)
    config.train.num_steps = 1000
    config.train.batch_size = 128
    config.train.learning_rate = 2e-3
    config.train.warmup_steps = 100
    config.train.eval_every = 250
    return config
