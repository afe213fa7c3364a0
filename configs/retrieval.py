"""Retrieval of the Long Range Arena: does one paper cite the other?

Data: 147,086 / 18,090 / 17,437 pairs of papers from the ACL Anthology Network (Radev et al., 2013)
as bytes, the first 4,000 of each, padded to 4,096; 257 token ids. The data are downloaded from the
Hugging Face hub (10.6 GB), or read from --config.data.source=DIR: the folder of
new_aan_pairs.{train,eval,test}.tsv, or of lra_release. The papers belong to their authors and the
ACL.

One encoder reads both documents; the inputs of the head are [a, b, a * b, a - b].

Floor: about 50 %. Test accuracy in the paper's table 1 (mean of three seeds, 50,000 steps): softmax
80.69, kernelized 81.77, Nystromformer 80.52, Linformer 78.19, Informer 77.57, Performer 80.04,
Reformer 78.99, BigBird 80.28, Skyformer 82.06.

Variant "paper" restores behaviour of the published code, see common.restore_published. Variant
"small" reads 256 bytes of each document with a smaller model, for a CPU.

    python train.py --config=configs/retrieval.py:skyformer
    python train.py --config=configs/retrieval.py:performer,small --config.data.source=DIR
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for "attention[,variant]"; variant is "", "paper" or "small"."""
    attention, variant = common.parse(argument, common.VARIANTS)
    config = common.paper_config("retrieval", attention, max_length=4096)
    config.train.learning_rate = 2e-4
    config.train.batch_size = 16
    config.train.warmup_steps = 800
    config.train.eval_every = 1000
    if variant == "paper":
        common.restore_published(config)
    if variant == "small":
        config.data.length = config.model.max_length = 256
        common.make_small(config, num_steps=500)
    return config
