"""Pathfinder of the Long Range Arena: are two discs the ends of one contour?

Data: about 160,000 / 20,000 / 20,000 images of 32 x 32 pixels (Linsley et al., 2018), "hard": two
contours of 14 dashes among shorter ones. They are read row by row: 1,024 tokens of 256 gray levels.
No token counts as padding, not even the black background. The images are generated on the first run
(minutes on all cores; no licence restrictions), or read from the published PNGs if
--config.data.source=DIR names the folder of lra_release.

The splits are chosen by a hash of the names of the images.

Floor: 50 %. Test accuracy in the paper's table 1 (mean of three seeds, 50,000 steps): softmax
65.26, kernelized 70.73, Nystromformer 69.48, Linformer 60.93, Informer 57.83, Performer 66.30,
Reformer 66.49, BigBird 68.72, Skyformer 70.73.

Variant "paper" restores behaviour of the published code: black pixels, two thirds of an image,
count as padding; see also common.restore_published. Variant "small" has the first 20,000 generated
images at 16 x 16 pixels, each the mean of four, and a smaller model, for a CPU; it learns little.

Variant "fast" begins with shorter contours: 500 steps with 3 dashes, 1,500 with 6 and 2,000 with 9,
then 8,000 with the task's 14. They are generated; those of 6 and 9 are in the published files, too.
Pixels below 64, which are the ground and traces of the down-sampling, are left out: 129 of 1,024
tokens are left on average, with their positions, sines and cosines of row and column. Batches of 32
have equal numbers of both classes; 32 landmarks or features, no dropout. On test, Skyformer has
69.2 % (three seeds), after 15 minutes of steps on one CPU core, kernelized 72.1 and softmax 66.9 %
(one seed each). Without the shorter contours, Skyformer is at chance after all 12,000 steps.

    python train.py --config=configs/pathfinder.py:skyformer
    python train.py --config=configs/pathfinder.py:skyformer,fast
    python train.py --config=configs/pathfinder.py:performer,small
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for "attention[,variant]"; variant: "", "paper", "fast" or "small"."""
    attention, variant = common.parse(argument, (*common.VARIANTS, "fast"))
    task = "pathfinder_small" if variant == "small" else "pathfinder"
    config = common.paper_config(task, attention, max_length=1024)
    config.train.learning_rate = 2e-4
    config.train.batch_size = 128
    config.train.warmup_steps = 312
    config.train.eval_every = 500
    if variant == "paper":
        config.data.mask_zeros = True
        common.restore_published(config)
    if variant == "fast":
        common.use_few_landmarks(config)
        config.model.positions = "sinusoidal_2d"
        config.model.dropout = 0.0
        config.data.drop_below = 64
        config.data.buckets = (96, 128, 160, 192, 256)
        config.train.curriculum = ("pathfinder_short", "pathfinder_easy", "pathfinder_intermediate")
        config.train.curriculum_steps = (500, 2000, 4000)
        config.train.balanced = True
        config.train.batch_size = 32
        config.train.learning_rate = 7e-4
        config.train.num_steps = 12_000
        config.train.warmup_steps = 100
        config.train.eval_every = 2000
    if variant == "small":
        config.data.shrink = 2
        config.model.max_length = 256
        config.train.batch_size = 32
        common.make_small(config, num_steps=500)
    return config
