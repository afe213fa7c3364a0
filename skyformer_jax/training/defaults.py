"""The fields of a config and their defaults, which follow the paper where tasks agree."""

from collections.abc import Mapping
from typing import Any

from skyformer_jax import attention, tasks
from skyformer_jax.errors import one_of


def default_config(task: tasks.Task, attention_name: str) -> dict[str, Any]:
    """Returns all fields of a run's config with their defaults.

    Fields that a config lacks, such as one of an earlier version, have these values.

    "attention" holds the options of the attention function and of its arrays. Their defaults are
    the paper's: 128 landmarks or features, blocks of 64 for BigBird, two rounds of hashing. Options
    whose default is None are left out.

    The model has 2 layers of width 64, an MLP of 128, 2 heads of 32, dropout 0.1, learned positions
    and mean pooling. The optimizer is AdamW without weight decay; gradients are clipped by value at
    1; the schedule is a linear one-cycle.

    Args:
      task: a task of this package or the user's own.
      attention_name: one of attention.NAMES.

    Raises:
      UserError: if the attention is unknown.
    """
    one_of("attention", attention_name, attention.NAMES)
    return {
        "task": task.name,
        **({} if task.definition is None else {"own_task": dict(task.definition)}),
        "seed": 0,
        "num_seeds": 1,  # models trained at once, with seeds seed, seed + 1, ...
        "compilation_cache": "~/.cache/skyformer_jax",  # "": every process compiles again
        "attention": {"name": attention_name, **attention.default_options(attention_name)},
        "model": {
            "vocab_size": task.vocab_size,
            "max_length": task.max_length,  # sequences are padded to this
            "num_classes": task.num_classes,
            "num_documents": task.num_documents,
            "num_layers": 2,
            "width": 64,
            "num_heads": 2,
            "head_dim": 32,
            "mlp_dim": 128,
            "dropout": 0.1,
            "pooling": "mean",
            "dtype": "float32",  # of activations, or bfloat16; parameters stay float32
            "remat": False,  # recompute blocks in the backward pass to save memory
            "positions": "learned",  # or sinusoidal, rotary; axial, sinusoidal_2d: square images
            "ngrams": (),  # lengths of n-grams whose embeddings are added to the tokens'
            "ngram_rows": 8192,  # rows of the table of each of them, which hashing shares
        },
        "train": {
            "num_steps": 50_000,
            "batch_size": 32,
            "curriculum": (),  # tasks whose training examples the first steps read ...
            "curriculum_steps": (),  # ... and the number of steps after which each of them ends
            "balanced": False,  # every batch has each class in about its share of the examples
            "sample_length": 0,  # number of tokens drawn at random from each document ...
            "sample_steps": 0,  # ... in this number of first steps; the others see all tokens
            "accumulation": 0,  # microbatches of a batch; 0: chosen for the device
            "learning_rate": 1e-4,  # peak of the schedule
            "warmup_steps": 1000,
            "weight_decay": 0.0,
            "eval_every": 500,  # steps between validations, each followed by a checkpoint
            "log_every": 50,
            "start_from": "",  # released checkpoint whose fitting parameters to start from
            "non_finite": "stop",  # or skip: steps whose loss or gradients are not finite
            "statistics": False,  # log norms of gradients and activations
        },
        "parallel": {  # docs/scaling.md
            "data": -1,  # shards of each batch; -1: all devices that seq leaves
            "seq": 1,  # shards of each sequence
            "backend": "shard_map",  # or pmap
            "coordinator": "",  # for several processes: auto, or host:port of process 0
            "num_processes": 0,  # 0: read from the environment
            "process_id": -1,  # -1: read from the environment
        },
        "data": {
            "dir": "data",  # folder of the prepared data sets
            "source": "",  # published folder or archive; "": use dir, else download or generate
            "kind": "",  # generated or published; "": the kind in dir, else generated if possible
            "buckets": (),  # lengths that batches of short examples are padded to instead
            "mask_zeros": False,  # stored values of 0, such as black pixels, count as padding
            "drop_below": 0,  # smaller stored values are left out; the others keep their positions
            **task.options,
        },
    }


def added_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that earlier versions of config.json lack, with the values they imply.

    Add every new field of default_config here.

    Args:
      config: the config, with "task", "attention" and "data".

    Raises:
      UserError: if the task or the attention is unknown.
    """
    name = one_of("attention", config["attention"]["name"], attention.NAMES)
    earlier = attention.REGISTRY[name].earlier_options
    return {
        "model.ngrams": [],  # as JSON has it
        "model.ngram_rows": 8192,
        "data.mask_zeros": False,
        "data.drop_below": 0,
        "train.start_from": "",
        "train.balanced": False,
        "train.curriculum": [],
        "train.curriculum_steps": [],
        "train.sample_length": 0,
        "train.sample_steps": 0,
        # Earlier versions chose the kind by the source alone.
        "data.kind": tasks.of(config).first_kind(config["data"].get("source")),
        **{f"attention.{option}": value for option, value in earlier.items()},
    }
