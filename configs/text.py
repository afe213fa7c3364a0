"""Text of the Long Range Arena: IMDB reviews, byte by byte, in the setting of the Skyformer paper.

Data: 22,500 / 2,500 / 25,000 reviews (Maas et al., 2011), negative or positive, as bytes: 1,300 on
average, the first 4,000 are read, padded to 4,096; 257 token ids. The data are downloaded (84 MB),
or read from --config.data.source=DIR: aclImdb/, its archive, or imdb_reviews as TFDS prepared it.
The reviews are for research and belong to their authors; IMDb's conditions of use apply.

The validation split is held out of the training data by a hash of the reviews, half of each class.

Floors: 50 %; logistic regressions on the frequencies of bytes 66.5 %, of bytes and n-grams 87.7 %
(results/text_floors.json). Test accuracy in the paper's table 1 (mean of three seeds, 50,000
steps, validated on the test set): softmax 61.95, kernelized 60.22, Nystromformer 64.83, Linformer
58.93, Informer 62.64, Performer 64.19, Reformer 62.93, BigBird 63.86, Skyformer 64.70.

Variant "paper" restores behaviour of the published code: the validation split is the test split,
and all 25,000 other reviews are the training split, in batches of 32 (16 according to the paper);
see also common.restore_published. Variant "small" reads 512 bytes with a smaller model, for a CPU.

Variant "fast" minimizes the time to accuracy: batches padded by length, of equal numbers of both
classes; rotary positions; and 1,000 steps at five times the learning rate. Skyformer has 65.0 % on
test (three seeds), after 13 minutes of steps on one CPU core; results/fast.json has all nine.
Unequal batches took 2,000 steps to the same accuracy, at three times the learning rate. The table
of learned positions has three quarters of the parameters, and overfits. results/recipes.json has
the runs that were tried.

Variant "ngrams" is "fast" with embeddings of the last 3 and the last 5 bytes, hashed to 8,192 rows
each, which are added to the embedding of each byte. Skyformer has 87.9, 87.6 and 87.8 % on test,
after 14 minutes; a logistic regression on the same n-grams has 87.7 %.

    python train.py --config=configs/text.py:skyformer
    python train.py --config=configs/text.py:skyformer,fast
    python train.py --config=configs/text.py:skyformer,ngrams
    python train.py --config=configs/text.py:performer,small
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for "attention[,variant]"; variants are described above."""
    attention, variant = common.parse(argument, (*common.VARIANTS, "fast", "ngrams"))
    config = common.paper_config("text", attention, max_length=4096)
    config.train.learning_rate = 1e-4
    config.train.batch_size = 16
    config.train.warmup_steps = 80
    config.train.eval_every = 500
    if variant == "paper":
        config.data.validate_on_test = True
        config.train.batch_size = 32
        common.restore_published(config)
    if variant == "ngrams":
        config.model.ngrams = (3, 5)
    if variant in ("fast", "ngrams"):
        config.model.positions = "rotary"
        config.data.buckets = (512, 1024, 2048)
        config.train.balanced = True
        config.train.learning_rate = 5e-4
        config.train.num_steps = 1000
        config.train.warmup_steps = 100
        config.train.eval_every = 250
    if variant == "small":
        config.data.length = config.model.max_length = 512
        config.train.batch_size = 32
        common.make_small(config, num_steps=1000)
    return config
