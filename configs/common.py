"""What the experiments share: the paper's model, optimizer and attentions.

A config file builds on this and says what is its own. Its get_config takes "attention[,variant]",
as in --config=configs/listops.py:kernelized,paper.
"""

from collections.abc import Sequence

import ml_collections

from skyformer_jax import attention, tasks
from skyformer_jax.errors import UserError, one_of

VARIANTS = ("paper", "small")  # beside "", the right one


def parse(argument: str, variants: Sequence[str] = ()) -> tuple[str, str]:
    """Splits "attention[,variant]" in two; skyformer and "" where left out."""
    name, _, variant = argument.partition(",")
    one_of("attention", name or "skyformer", attention.NAMES)
    if variant and not variants:
        raise UserError(f"unknown variant {variant!r}; this config has none")
    return name or "skyformer", one_of("variant", variant, variants) if variant else ""


def paper_config(task: str, name: str, *, max_length: int) -> ml_collections.ConfigDict:
    """The paper's setting of everything that does not depend on the task (FACTS: appendix).

    Each attention has the options that its function and its arrays have, whose defaults are the
    paper's: 128 landmarks or features, BigBird's blocks of 64, two rounds of hashing.

    2 layers of width 64, MLP 128, 2 heads of 32, dropout 0.1, learned positions, mean pooling;
    AdamW without weight decay, gradients clipped by value at 1, linear one-cycle schedule.
    """
    return ml_collections.ConfigDict(
        {
            "task": task,
            "seed": 0,
            "num_seeds": 1,  # models trained at once: of seed, seed + 1, ...
            "compilation_cache": "~/.cache/skyformer_jax",  # "" compiles anew in every process
            "attention": {"name": name, **attention.default_options(name)},
            "model": {
                "vocab_size": tasks.get(task).vocab_size,
                "max_length": max_length,  # sequences are padded to this
                "num_classes": tasks.get(task).num_classes,
                "num_documents": tasks.get(task).num_documents,
                "num_layers": 2,
                "width": 64,
                "num_heads": 2,
                "head_dim": 32,
                "mlp_dim": 128,
                "dropout": 0.1,
                "pooling": "mean",
                "dtype": "float32",  # or bfloat16: of activations; parameters stay float32
                "remat": False,  # compute blocks again in the backward pass, to save memory
                "positions": "learned",  # or sinusoidal, without a table of max_length
            },
            "train": {
                "num_steps": 50_000,
                "batch_size": 32,
                "accumulation": 0,  # equal parts of a batch, one after another; 0: what suits
                "learning_rate": 1e-4,  # the peak
                "warmup_steps": 1000,
                "weight_decay": 0.0,
                "eval_every": 500,  # steps between validations, each followed by a checkpoint
                "log_every": 50,
                "non_finite": "stop",  # or skip: steps whose loss or gradients are not finite
                "statistics": False,  # log gradient norms and sizes of activations
            },
            "parallel": {  # docs/scaling.md
                "data": -1,  # parts of each batch; -1: the devices that seq leaves
                "seq": 1,  # parts of each sequence
                "backend": "shard_map",  # or pmap
                "coordinator": "",  # several processes: auto, or host:port of process 0
                "num_processes": 0,  # 0: as the environment says
                "process_id": -1,  # -1: as the environment says
            },
            "data": {
                "dir": "data",  # where prepared data sets lie or are put
                "source": "",  # a folder or archive as published; "" generates or downloads
                "buckets": (),  # lengths that batches of short examples are padded to instead
                **tasks.get(task).options,
            },
        }
    )


def restore_published(config: ml_collections.ConfigDict) -> None:
    """Changes a config to what the published code computes, where that is an option.

    The mean pooling divides by the padded length, and Performer's scores are scaled twice.

    Not restored, beside what only differs in its random numbers: Skyformer and Nystromformer start
    their iteration from a maximum over the batch, Nystromformer averages padding into its
    landmarks, Linformer has a projection for each head, the same for keys and values, which is
    never trained on a GPU, Performer adds 1e-4 to its features and counts padding in its
    denominator, Informer measures each query by keys of its own, padding among them, and Reformer
    attends to other buckets of its chunk as well. Landmarks and Performer's directions are not
    drawn anew at evaluation. docs/published_weights.md says what that makes of the logits.
    """
    config.model.pooling = "padded_mean"
    if config.attention.name == "performer":
        config.attention.scale = 1 / config.model.head_dim


def use_few_landmarks(config: ml_collections.ConfigDict) -> None:
    """Gives an attention 32 landmarks or features, where it has them, for short sequences."""
    for option in ("num_landmarks", "num_features"):
        if option in config.attention:
            config.attention[option] = 32


def make_small(config: ml_collections.ConfigDict, *, num_steps: int) -> None:
    """Changes a config to a model and a number of steps for two CPU cores: minutes, not days.

    One layer, 32 landmarks or features, a higher learning rate; five validations.
    """
    config.model.num_layers = 1
    use_few_landmarks(config)
    config.train.num_steps = num_steps
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = num_steps // 10
    config.train.eval_every = num_steps // 5
