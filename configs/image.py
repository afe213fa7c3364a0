"""Image of the Long Range Arena: CIFAR-10 in gray, pixel by pixel, in the setting of the paper.

Data: 45,000 / 5,000 / 10,000 photographs (Krizhevsky, 2009) of 32 x 32 pixels and 10 classes, to
gray by the ITU-R 601 weights, row by row: 1,024 tokens of 256 gray levels, all of them real, black
ones included. Downloaded (170 MB), or read from where --config.data.source=DIR says:
cifar-10-batches-bin/, its archive, or what TFDS prepared as cifar10. No licence is stated; its
authors ask for the citation.

Validation is held out of train by the hashes of the photographs, 500 of each class.

Floor: 10 %. Test accuracy in the paper's table 1 (mean of three seeds, 50,000 steps): softmax
40.57, kernelized 41.29, Nystromformer 41.30, Linformer 37.96, Informer 38.10, Performer 41.43,
Reformer 48.87, BigBird 43.16, Skyformer 40.77.

Variant "paper" restores of the published code that black pixels count as padding, and what
common.restore_published says. Variant "small" is 16 x 16 pixels, each the mean of four, and a
smaller model, for a CPU.

    python train.py --config=configs/image.py:skyformer
    python train.py --config=configs/image.py:performer,small
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """argument: "attention[,variant]", variant "", "paper" or "small"."""
    attention, variant = common.parse(argument, common.VARIANTS)
    config = common.paper_config("image", attention, max_length=1024)
    config.train.learning_rate = 1e-4
    config.train.batch_size = 256
    config.train.warmup_steps = 175
    config.train.eval_every = 50
    if variant == "paper":
        config.data.mask_zeros = True
        common.restore_published(config)
    if variant == "small":
        config.data.shrink = 2
        config.model.max_length = 256
        config.train.batch_size = 32
        common.make_small(config, num_steps=1500)
    return config
