"""Checks of the fields of a config that say which examples and tokens are read."""

import ml_collections

from skyformer_jax import tasks
from skyformer_jax.errors import UserError, one_of


def check_data(config: ml_collections.ConfigDict, task: tasks.Task) -> None:
    """Raises a UserError for the first field about data that is invalid.

    Args:
      config: the complete configuration.
      task: its task.
    """
    data, max_length = config.data, config.model.max_length
    for option in ("length", "shrink"):
        if option in data and not 1 <= data[option] <= task.max_length:
            raise UserError(f"data.{option} must be in 1..{task.max_length}; got {data[option]}")
    longest = task.longest(data)
    if max_length < longest:
        raise UserError(
            f"model.max_length must be at least {longest}, the length of task {task.name} with "
            f"this config.data; got {max_length}"
        )
    if list(data.buckets) != sorted({size for size in data.buckets if 0 < size < max_length}):
        raise UserError(
            "data.buckets must be ascending lengths below model.max_length="
            f"{max_length}; got {tuple(data.buckets)}"
        )
    if data.buckets and config.model.pooling == "padded_mean":
        raise UserError(
            "model.pooling=padded_mean divides by the padded length, so that data.buckets would "
            "change the predictions; leave one of them out"
        )
    _check_sampling(config)
    _check_curriculum(config, task)
    if not 0 <= data.drop_below <= 255:
        raise UserError(f"data.drop_below must be in 0..255; got {data.drop_below}")
    if data.drop_below and config.model.positions == "rotary":
        raise UserError(
            "data.drop_below needs other model.positions than rotary, which count the tokens that "
            "are left"
        )


def _check_sampling(config: ml_collections.ConfigDict) -> None:
    train, model = config.train, config.model
    if train.sample_steps < 0:
        raise UserError(f"train.sample_steps must be at least 0; got {train.sample_steps}")
    if not train.sample_steps:
        if train.sample_length:
            raise UserError(
                f"train.sample_length={train.sample_length} needs train.sample_steps, the number "
                "of first steps that draw so many tokens; set both, or both to 0"
            )
        return
    if not 0 < train.sample_length < model.max_length:
        raise UserError(
            "train.sample_steps needs train.sample_length, the number of tokens to draw, in "
            f"1..{model.max_length - 1} (model.max_length - 1); got {train.sample_length}"
        )
    if model.positions == "rotary" or model.pooling != "mean" or model.ngrams:
        raise UserError(
            "train.sample_steps needs model.pooling=mean, no model.ngrams, and other "
            "model.positions than rotary; these need tokens that drawing may leave out"
        )


def _check_curriculum(config: ml_collections.ConfigDict, task: tasks.Task) -> None:
    names, ends = config.train.curriculum, config.train.curriculum_steps
    same = [
        name
        for name, other in tasks.TASKS.items()
        if (other.builder, other.max_length) == (task.builder, task.max_length)
    ]
    for name in names:
        one_of("task in train.curriculum", name, same)
    if len(names) != len(ends) or list(ends) != sorted({end for end in ends if end > 0}):
        raise UserError(
            "train.curriculum_steps must name, for each task of train.curriculum, the number of "
            f"steps after which it ends, in ascending order; got {tuple(ends)} for {tuple(names)}"
        )
