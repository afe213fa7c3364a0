"""Steps per second of a config's training step, each attention side by side in one process.

    python experiments/step_speed.py --config=listops --attentions=softmax,kernelized,skyformer

Random tokens at the config's full length stand in for the data, which the speed does not depend
on. Compilation is timed apart; the attentions take turns, and medians are reported. Writes JSON
with commit, versions and hardware.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import ml_collections
import numpy as np
from absl import flags

from experiments.provenance import provenance
from skyformer_jax import attention, cli
from skyformer_jax.config import one_of
from skyformer_jax.data.batches import Batch
from skyformer_jax.models import build_model
from skyformer_jax.training import evaluation, steps

_CONFIG = flags.DEFINE_string("config", "listops", "Name of a file in configs/.")
_VARIANT = flags.DEFINE_string("variant", "", "Variant of the config, small for example.")
_ATTENTIONS = flags.DEFINE_list("attentions", list(attention.NAMES), "Which to compare.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns that each attention takes.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1, "Steps timed in a turn.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "results/step_speed.json", "File to write.")


def _random_batch(config: ml_collections.ConfigDict) -> Batch:
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, *steps.token_shape(config))
    return Batch(
        rng.integers(1, min(config.model.vocab_size, 256), shape, np.uint8),
        np.full(shape[:-1], config.model.max_length, np.int32),
        rng.integers(0, config.model.num_classes, shape[0], np.int32),
    )


def main() -> None:
    """Compiles all, lets them take turns, prints a table and writes the JSON."""
    get_config = importlib.import_module(f"configs.{_CONFIG.value}").get_config
    mesh = steps.make_mesh()
    runs, rows = {}, {}
    for name in _ATTENTIONS.value:
        name = one_of("attention", name, attention.NAMES)
        config = get_config(f"{name},{_VARIANT.value}")
        model, optimizer = build_model(config), steps.make_optimizer(config)
        state = steps.init_state(0, model, optimizer, steps.token_shape(config))
        batch = steps.shard_batch(_random_batch(config), mesh)
        step = steps.make_train_step(
            model, optimizer, mesh, config.train.log_every, evaluation.reading(config)
        )
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        rows[name] = {
            "compile_seconds": time.perf_counter() - start,
            "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "seconds_per_step": [],
        }
        state, sums = jax.block_until_ready(compiled(state, batch))  # warm
        runs[name] = (compiled, state, batch)
        print(f"{name}: compiled in {rows[name]['compile_seconds']:.1f} s", file=sys.stderr)
    for turn in range(_ROUNDS.value):
        for name, (compiled, state, batch) in runs.items():
            start = time.perf_counter()
            for _ in range(_STEPS.value):
                state, sums = compiled(state, batch)
            jax.block_until_ready(sums)
            rows[name]["seconds_per_step"].append((time.perf_counter() - start) / _STEPS.value)
            runs[name] = (compiled, state, batch)
            print(
                f"turn {turn + 1}, {name}: {rows[name]['seconds_per_step'][-1]:.2f} s",
                file=sys.stderr,
            )
    for name, row in rows.items():
        row["median_seconds_per_step"] = statistics.median(row["seconds_per_step"])
        row["steps_per_second"] = 1 / row["median_seconds_per_step"]
        print(
            f"{name:12}{row['steps_per_second']:8.3f} steps/s"
            f"{row['temporaries_bytes'] / 2**20:10,.0f} MiB of temporaries"
        )
    result = {
        "what": "training step of the full setting, random tokens at full length",
        "config": _CONFIG.value,
        "variant": _VARIANT.value,
        "batch_size": config.train.batch_size,
        "length": config.model.max_length,
        **provenance(mesh.size),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "steps_per_round": _STEPS.value,
        "attentions": rows,
    }
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
