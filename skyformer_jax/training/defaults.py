"""The fields of a config and their defaults: the paper's setting of what no task changes."""

from collections.abc import Mapping
from typing import Any

from skyformer_jax import attention, tasks
from skyformer_jax.errors import one_of


def default_config(task: tasks.Task, attention_name: str) -> dict[str, Any]:
    """All fields that the config of a run has, with their defaults.

    A config that lacks some of them, as those of earlier versions do, means these values.

    Each attention has the options that its function and its arrays have, whose defaults are the
    paper's: 128 landmarks or features, BigBird's blocks of 64, two rounds of hashing. Options whose
    default is None are left out.

    2 layers of width 64, MLP 128, 2 heads of 32, dropout 0.1, learned positions, mean pooling;
    AdamW without weight decay, gradients clipped by value at 1, linear one-cycle schedule.

    Args:
      task: the task, of this package or the user's own.
      attention_name: name of the attention.

    Raises:
      UserError: if there is no such attention.
    """
    one_of("attention", attention_name, attention.NAMES)
    return {
        "task": task.name,
        **({} if task.definition is None else {"own_task": dict(task.definition)}),
        "seed": 0,
        "num_seeds": 1,  # models trained at once: of seed, seed + 1, ...
        "compilation_cache": "~/.cache/skyformer_jax",  # "" compiles anew in every process
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
            "dtype": "float32",  # or bfloat16: of activations; parameters stay float32
            "remat": False,  # compute blocks again in the backward pass, to save memory
            "positions": "learned",  # or sinusoidal or rotary, without a table of max_length
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
            "start_from": "",  # folder of a released checkpoint; its parameters, where they fit
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
            "source": "",  # folder or archive as published; "": what dir holds, or makes anew
            "kind": "",  # generated or published; "": what dir holds, else generated if it can
            "buckets": (),  # lengths that batches of short examples are padded to instead
            "mask_zeros": False,  # stored values of 0, as black pixels, count as padding
            **task.options,
        },
    }


def added_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a config.json did not have at first, and what was computed without them.

    A field that is added to default_config belongs here.

    Args:
      config: the config, with "task", "attention" and "data".

    Raises:
      UserError: if there is no such task or attention.
    """
    name = one_of("attention", config["attention"]["name"], attention.NAMES)
    earlier = attention.REGISTRY[name].earlier_options
    return {
        "data.mask_zeros": False,
        "train.start_from": "",
        # The source alone said it.
        "data.kind": tasks.of(config).first_kind(config["data"].get("source")),
        **{f"attention.{option}": value for option, value in earlier.items()},
    }
