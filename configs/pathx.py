"""Path-X of the Long Range Arena: Pathfinder at 128 x 128 pixels, a sequence of 16,384 tokens.

Data: about 160,000 / 20,000 / 20,000 images of 128 x 128 pixels (Linsley et al., 2018), "hard": two
contours of 14 dashes among shorter ones, row by row, 256 gray levels, all of them real, the black
ground included. Generated here on the first run (see docs/data.md for what that takes), or the
published PNGs where --config.data.source=DIR names the folder of lra_release.

Floor: 50 %. The Skyformer paper does not report it; all attentions of the Long Range Arena's paper
stay at the floor, and state-space models reach 88 to 98 %. So the setting is Pathfinder's, with a
batch of 16.

Variant "paper": black pixels count as padding, as the published code would have it, and what
common.restore_published says. Variant "small" takes a few steps of a smaller model on the first
20,000 generated images at 32 x 32 pixels, each the mean of sixteen: it shows that all works, and
learns nothing.

    python train.py --config=configs/pathx.py:skyformer
    python train.py --config=configs/pathx.py:performer,small
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """argument: "attention[,variant]", variant "", "paper" or "small"."""
    attention, variant = common.parse(argument, common.VARIANTS)
    task = "pathx_small" if variant == "small" else "pathx"
    config = common.paper_config(task, attention, max_length=16_384)
    config.train.learning_rate = 2e-4
    config.train.batch_size = 16
    config.train.warmup_steps = 312
    config.train.eval_every = 1000
    if variant == "paper":
        config.data.mask_zeros = True
        common.restore_published(config)
    if variant == "small":
        config.data.shrink = 4
        config.model.max_length = 1024
        config.train.batch_size = 8
        common.make_small(config, num_steps=100)
    return config
