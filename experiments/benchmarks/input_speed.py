"""How fast examples come from memory, and what share of a training step waits for them.

    python -m experiments.benchmarks.input_speed --tasks=text,image --data_dir=data

For each task: seconds to read the training split into memory; examples a second that batching
delivers, padded to the paper's length, with and without buckets, medians of several turns; and of
training steps run one by one, each waited for, the share of the time that went into making the
batch and putting it on the devices. Nothing overlaps in that, so it is more than a run waits.
Writes JSON with commit, versions, hardware and the data's checksums.
"""

import importlib
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.provenance import provenance, write_json
from skyformer_jax import cli, tasks
from skyformer_jax.data import store
from skyformer_jax.data.batches import training_batches
from skyformer_jax.data.examples import Examples
from skyformer_jax.models import build_model
from skyformer_jax.training import evaluation, steps
from skyformer_jax.training import mesh as meshes

_TASKS = flags.DEFINE_list("tasks", ["text", "image"], "Which tasks; their data are prepared.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of all data sets.")
_SOURCE = flags.DEFINE_string("source", "", "Folder of the published files.")
_ATTENTION = flags.DEFINE_string("attention", "skyformer", "Attention of the training steps.")
_STEPS = flags.DEFINE_integer("steps", 10, "Training steps of each setting.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Turns of batching.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "results/input_speed.json", "File to write.")

_SECONDS_A_TURN = 1.0


def examples_a_second(examples: Examples, config: ml_collections.ConfigDict) -> list[float]:
    """Of batching alone, one figure a turn."""
    size = config.train.batch_size
    batches = training_batches(
        examples, size, config.model.max_length, seed=0, buckets=config.data.buckets
    )
    next(batches)
    rates = []
    for _ in range(_TURNS.value):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS_A_TURN:
            next(batches)
            count += size
        rates.append(count / (time.perf_counter() - start))
    return rates


def step_times(examples: Examples, config: ml_collections.ConfigDict) -> tuple[float, float]:
    """Seconds of all steps, and of these what went into input; compilation apart."""
    model, optimizer, mesh = build_model(config), steps.make_optimizer(config), meshes.make_mesh()
    state = steps.init_states([0], model, optimizer, steps.token_shape(config))
    state = jax.device_put(state, NamedSharding(mesh, P()))  # where the step leaves it
    step = steps.train_step_of(config, model, optimizer, mesh)
    batches = training_batches(examples, config.train.batch_size, config.model.max_length, seed=0)
    total = spent = 0.0
    for i in range(_STEPS.value + 1):
        start = time.perf_counter()
        batch = jax.tree.map(lambda x: x[None, None], next(batches))  # one step, one seed
        batch = jax.block_until_ready(meshes.shard_batch(batch, mesh, axis=2))
        made = time.perf_counter()
        state, sums = step(state, batch)
        jax.block_until_ready(sums)
        if i:  # the first compiles
            spent += made - start
            total += time.perf_counter() - start
    return total, spent


def measure(name: str) -> dict[str, Any]:
    """All figures of a task."""
    get_config = importlib.import_module(f"configs.{name}").get_config
    result: dict[str, Any] = {}
    for variant in ("", "small"):
        config = get_config(f"{_ATTENTION.value},{variant}")
        config.data.dir, config.data.source = _DATA_DIR.value, _SOURCE.value
        start = time.perf_counter()
        examples = evaluation.load_split(config, "train")
        seconds = time.perf_counter() - start
        total, spent = step_times(examples, config)
        longest = config.model.max_length
        rates = {}
        for what, buckets in (("fixed length", ()), ("buckets", (longest // 4, longest // 2))):
            config.data.buckets = buckets
            rates[what] = statistics.median(examples_a_second(examples, config))
        data_set = tasks.get(config.task).data_set(_DATA_DIR.value, source=_SOURCE.value or None)
        result[variant or "full"] = {
            "data": store.describe(data_set),
            "examples": len(examples),
            "checksum": examples.checksum(),
            "mean_length": float(examples.lengths.mean()),
            "padded_length": longest,
            "batch_size": config.train.batch_size,
            "seconds_to_load": seconds,
            "examples_per_second": rates,
            "seconds_per_step": total / _STEPS.value,
            "input_share_of_step": spent / total,
        }
        print(
            f"{name:11}{variant or 'full':6}{rates['fixed length']:12,.0f} examples/s"
            f"{rates['buckets']:12,.0f} in buckets{total / _STEPS.value:9.3f} s/step"
            f"{100 * spent / total:8.2f} % input",
            flush=True,
        )
    return result


def main() -> None:
    """Measures the tasks one after the other and writes the JSON."""
    result = {
        "what": "input from memory, and its share of training steps that are waited for",
        "attention": _ATTENTION.value,
        **provenance(jax.device_count()),
        "seed": 0,
        "steps": _STEPS.value,
        "turns": _TURNS.value,
        "tasks": {name: measure(name) for name in _TASKS.value},
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
