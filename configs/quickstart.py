"""Skyformer on short ListOps expressions: the whole system in a few minutes on two CPU cores.

Data: 50,000 / 2,000 / 5,000 expressions of 5 to 47 tokens and at most 4 levels, generated on the
first run. The grammar and the file format are those of the full task (configs/listops.py).

The learning rate and the batch are larger than in the paper's setting, since short sequences allow
both. 32 landmarks or features represent the rows of queries and keys, at most 94.

    python train.py --config=configs/quickstart.py
    python train.py --config=configs/quickstart.py:softmax
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for an attention, one of attention.NAMES; "" means skyformer."""
    attention, _ = common.parse(argument)
    config = common.paper_config("listops_small", attention, max_length=48)
    common.use_few_landmarks(config)
    config.train.num_steps = 1200
    config.train.batch_size = 128
    config.train.learning_rate = 2e-3
    config.train.warmup_steps = 100
    config.train.eval_every = 200
    return config
