"""What the experiments share: the paper's model, optimizer and attentions.

A config file builds on this and says what is its own. Its get_config takes "attention[,variant]",
as in --config=configs/listops.py:kernelized,paper.
"""

from collections.abc import Sequence

import ml_collections

from skyformer_jax import attention
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.training.defaults import default_config

VARIANTS = ("paper", "small")  # beside "", the right one


def parse(argument: str, variants: Sequence[str] = ()) -> tuple[str, str]:
    """Splits "attention[,variant]" in two; skyformer and "" where left out."""
    name, _, variant = argument.partition(",")
    one_of("attention", name or "skyformer", attention.NAMES)
    if variant and not variants:
        raise UserError(f"unknown variant {variant!r}; this config has none")
    return name or "skyformer", one_of("variant", variant, variants) if variant else ""


def paper_config(task: str, name: str, *, max_length: int) -> ml_collections.ConfigDict:
    """The paper's setting of everything that does not depend on the task (its appendix).

    skyformer_jax/training/defaults.py lists all fields, with what they mean.
    """
    config = ml_collections.ConfigDict(default_config(task, name))
    config.model.max_length = max_length  # sequences are padded to this
    return config


def restore_published(config: ml_collections.ConfigDict) -> None:
    """Changes a config to what the published code computes, where that is an option.

    The mean pooling divides by the padded length, Performer's scores are scaled twice, and BigBird's
    global blocks are the first and the last.

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
    if config.attention.name == "bigbird":
        config.attention.global_blocks = "first_last"


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
