"""Path-X of the Long Range Arena: Pathfinder at 128 x 128 pixels, a sequence of 16,384 tokens.

Data: about 160,000 / 20,000 / 20,000 images of 128 x 128 pixels (Linsley et al., 2018), "hard": two
contours of 14 dashes among shorter ones. They are read row by row as 256 gray levels. No token
counts as padding, not even the black background. The images are generated on the first run
(docs/data.md gives the time and the space), or read from the published PNGs if
--config.data.source=DIR names the folder of lra_release.

Floor: 50 %. The Skyformer paper does not report this task. All attentions of the Long Range Arena
paper stay at the floor; state-space models reach 88 to 98 %. The setting is therefore that of
Pathfinder, with a batch of 16.

Variant "paper": black pixels count as padding, as in the published code; see also
common.restore_published. Variant "small" trains a smaller model for a few steps on the first 20,000
generated images at 32 x 32 pixels, each the mean of sixteen. It checks that the code runs, and
learns nothing.

    python train.py --config=configs/pathx.py:skyformer
    python train.py --config=configs/pathx.py:performer,small
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for "attention[,variant]"; variant is "", "paper" or "small"."""
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
