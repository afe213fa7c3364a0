"""Measures how fast examples come from memory, and the share of a training step for input.

    python -m experiments.benchmarks.input_speed --tasks=text,image --data_dir=data

Measures for each task: the seconds to read the training split into memory; the examples per second
of batching, padded to the config's length, with and without buckets (medians of five turns); and
the share of a training step that goes into making the batch and putting it on the devices. The
steps run one by one, each waited for, so nothing overlaps, and the share is more than a run waits.
Writes JSON with commit, versions, hardware and checksums of the data. --small measures only the
small variant of each task; otherwise the paper's setting is measured as well.
"""

import importlib
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.benchmarks import common_flags
from experiments.records import provenance, write_json
from skyformer_jax import cli, tasks
from skyformer_jax.data import store
from skyformer_jax.data.batches import stack_batches, training_batches
from skyformer_jax.data.examples import Examples
from skyformer_jax.training.mesh import shard_batch
from skyformer_jax.training.run import Run, new_run
from skyformer_jax.training.sharded_step import make_train_step
from skyformer_jax.training.state import init_states

_TASKS = flags.DEFINE_list(
    "tasks", ["text", "image"], "Tasks to measure; missing data are prepared."
)
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of all data sets.")
_SOURCE = flags.DEFINE_string("source", "", "Folder of the published files.")
_STEPS = flags.DEFINE_integer("steps", 10, "Training steps of each setting.", lower_bound=1)
_SMALL = common_flags.small()
_OUT = common_flags.out("results/input_speed.json")

_TURNS, _SECONDS_A_TURN = 5, 1.0  # of batching


def examples_a_second(
    examples: Examples, size: int, max_length: int, buckets: tuple[int, ...]
) -> float:
    """Measures examples per second of batching alone, the median of the turns."""
    batches = training_batches(examples, size, max_length, seed=0, buckets=buckets)
    next(batches)
    rates = []
    for _ in range(_TURNS):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS_A_TURN:
            next(batches)
            count += size
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def step_times(examples: Examples, run: Run) -> tuple[float, float]:
    """Returns the seconds of all steps and those that went into input, without compilation."""
    config, states, train_step = run.config, init_states(run), make_train_step(run)
    batches = training_batches(examples, config.train.batch_size, config.model.max_length, seed=0)
    total = spent = 0.0
    for i in range(_STEPS.value + 1):
        start = time.perf_counter()
        batch = stack_batches([next(batches)])  # for one seed
        batch = jax.block_until_ready(shard_batch(batch, run.mesh, axis=1))
        made = time.perf_counter()
        states, sums = train_step(states, batch)
        jax.block_until_ready(sums)
        if i:  # the first compiles
            spent += made - start
            total += time.perf_counter() - start
    return total, spent


def measure(name: str) -> dict[str, Any]:
    """Measures all figures of a task."""
    get_config = importlib.import_module(f"configs.{name}").get_config
    result: dict[str, Any] = {}
    for variant in ("small",) if _SMALL.value else ("", "small"):
        config = get_config(f"skyformer,{variant}")
        config.data.dir, config.data.source = _DATA_DIR.value, _SOURCE.value
        start = time.perf_counter()
        run = new_run(config)
        examples = run.load_split("train")
        seconds = time.perf_counter() - start
        total, spent = step_times(examples, run)
        size, longest = config.train.batch_size, config.model.max_length
        buckets = {"fixed length": (), "buckets": (longest // 4, longest // 2)}
        data_set = tasks.of(config).data_set(_DATA_DIR.value, source=_SOURCE.value or None)
        result[variant or "full"] = {
            "data": store.describe(data_set),
            "examples": len(examples),
            "checksum": examples.checksum(),
            "mean_length": float(examples.lengths.mean()),
            "padded_length": longest,
            "batch_size": size,
            "seconds_to_load": seconds,
            "examples_per_second": {
                what: examples_a_second(examples, size, longest, lengths)
                for what, lengths in buckets.items()
            },
            "seconds_per_step": total / _STEPS.value,
            "input_share_of_step": spent / total,
        }
    return result


def main() -> None:
    """Measures one task after another and writes the JSON."""
    result = {
        "what": "input from memory, and its share of training steps that are waited for",
        "attention": "skyformer",
        **provenance(jax.device_count()),
        "seed": 0,
        "steps": _STEPS.value,
        "turns": _TURNS,
        "small": _SMALL.value,
        "tasks": {name: measure(name) for name in _TASKS.value},
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
