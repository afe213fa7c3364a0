"""Image of the Long Range Arena: CIFAR-10 in gray, pixel by pixel, in the setting of the paper.

Data: 45,000 / 5,000 / 10,000 photographs (Krizhevsky, 2009) of 32 x 32 pixels in 10 classes,
converted to gray with the ITU-R 601 weights and read row by row: 1,024 tokens of 256 gray levels.
No token counts as padding, not even black pixels. The data are downloaded (170 MB), or read from
--config.data.source=DIR: cifar-10-batches-bin/, its archive, or cifar10 as TFDS prepared it. No
licence is stated; the authors ask for citation.

The validation split is held out of the training data by a hash of the photographs, 500 per class.

Floor: 10 %. Test accuracy in the paper's table 1 (mean of three seeds, 50,000 steps): softmax
40.57, kernelized 41.29, Nystromformer 41.30, Linformer 37.96, Informer 38.10, Performer 41.43,
Reformer 48.87, BigBird 43.16, Skyformer 40.77.

Variant "paper" restores behaviour of the published code: black pixels count as padding; see also
common.restore_published. Variant "small" has 16 x 16 pixels, each the mean of four, and a smaller
model, for a CPU.

Variant "fast" minimizes the time to accuracy: each of the first 15,000 steps of 32 sees 256 random
pixels of each photograph, and the last 1,000 see all of them; a position is the sum of a row and a
column; ten times the learning rate, no dropout, and 32 landmarks or features. On test, Skyformer
has 42.4 %, after 50 minutes of steps on one CPU core, kernelized 45.2 % and softmax 46.8 %, after
90 minutes (one seed each). On validation, which has all pixels, steps 14,001 to 16,000 raise
kernelized by 17 points, Skyformer by 6, softmax by 0.1; docs/reproduction.md has a likely reason.

    python train.py --config=configs/image.py:skyformer
    python train.py --config=configs/image.py:skyformer,fast
    python train.py --config=configs/image.py:performer,small
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for "attention[,variant]"; variant: "", "paper", "fast" or "small"."""
    attention, variant = common.parse(argument, (*common.VARIANTS, "fast"))
    config = common.paper_config("image", attention, max_length=1024)
    config.train.learning_rate = 1e-4
    config.train.batch_size = 256
    config.train.warmup_steps = 175
    config.train.eval_every = 50
    if variant == "paper":
        config.data.mask_zeros = True
        common.restore_published(config)
    if variant == "fast":
        common.use_few_landmarks(config)
        config.model.positions = "axial"
        config.model.dropout = 0.0
        config.train.batch_size = 32
        config.train.sample_length = 256
        config.train.sample_steps = 15_000
        config.train.learning_rate = 1e-3
        config.train.num_steps = 16_000
        config.train.warmup_steps = 500
        config.train.eval_every = 2000
    if variant == "small":
        config.data.shrink = 2
        config.model.max_length = 256
        config.train.batch_size = 32
        common.make_small(config, num_steps=1500)
    return config
