"""What the config files share: the paper's model, optimizer and attentions.

A config file starts from paper_config and sets the fields of its task. Its get_config takes
"attention[,variant]", as in --config=configs/listops.py:kernelized,paper.
"""

from collections.abc import Sequence

import ml_collections

from skyformer_jax import attention, tasks
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.training.defaults import default_config

VARIANTS = ("paper", "small")  # besides "", the default


def parse(argument: str, variants: Sequence[str] = ()) -> tuple[str, str]:
    """Splits "attention[,variant]" into both parts; the defaults are skyformer and ""."""
    name, _, variant = argument.partition(",")
    one_of("attention", name or "skyformer", attention.NAMES)
    if variant and not variants:
        raise UserError(f"unknown variant {variant!r}; this config has none")
    return name or "skyformer", one_of("variant", variant, variants) if variant else ""


def paper_config(
    task: str | tasks.Task, name: str, *, max_length: int
) -> ml_collections.ConfigDict:
    """Returns a config with the settings of the paper (its appendix) that all tasks share.

    skyformer_jax/training/defaults.py lists and explains all fields.

    Args:
      task: the name of a task of this package, or your own task, made by tasks.define.
      name: the attention, one of attention.NAMES.
      max_length: the length that sequences are padded to.
    """
    task = tasks.get(task) if isinstance(task, str) else task
    config = ml_collections.ConfigDict(default_config(task, name))
    config.model.max_length = max_length
    return config


def restore_published(config: ml_collections.ConfigDict) -> None:
    """Changes a config to compute what the published code computes, where an option allows it.

    Mean pooling divides by the padded length, Performer's scores are scaled twice, and BigBird's
    global blocks are the first and the last.

    The following behaviour of the published code is not restored, besides differences in random
    numbers alone:

    - Skyformer and Nystromformer start their iteration from a maximum over the batch.
    - Nystromformer averages padding into its landmarks.
    - Linformer has one projection for each head, shared by keys and values, which is never trained
      on a GPU.
    - Performer adds 1e-4 to its features and counts padding in its denominator.
    - Informer samples keys separately for each query, padding included.
    - Reformer also attends to other buckets of its chunk.

    Landmarks and Performer's directions are not redrawn at evaluation. docs/published_weights.md
    lists the effect of these differences on the logits.
    """
    config.model.pooling = "padded_mean"
    if config.attention.name == "performer":
        config.attention.scale = 1 / config.model.head_dim
    if config.attention.name == "bigbird":
        config.attention.global_blocks = "first_last"


def use_few_landmarks(config: ml_collections.ConfigDict) -> None:
    """Sets 32 landmarks or features, if the attention has them, for short sequences."""
    for option in ("num_landmarks", "num_features"):
        if option in config.attention:
            config.attention[option] = 32


def make_small(config: ml_collections.ConfigDict, *, num_steps: int) -> None:
    """Reduces model and steps of a config so that two CPU cores train it in minutes, not days.

    The model has one layer and 32 landmarks or features. The learning rate is higher, and there
    are five validations.
    """
    config.model.num_layers = 1
    use_few_landmarks(config)
    config.train.num_steps = num_steps
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = num_steps // 10
    config.train.eval_every = num_steps // 5
