"""Steps per second of a config's training step, each attention side by side in one process.

    python -m experiments.benchmarks.step_speed --config=listops --attentions=softmax,kernelized,skyformer
    python -m experiments.benchmarks.step_speed --config=text --batch_size=4 --out=results/step_speed_text.json

Beside the nine there is kernelized-dense, which holds all scores. Random tokens at the config's
full length stand in for the data, which the speed does not depend on. Compilation is timed apart;
the attentions take turns, and medians are reported. Writes JSON with commit, versions and hardware.
"""

import importlib
from pathlib import Path

import jax
import ml_collections
from absl import flags
from skyformer_jax.config import one_of

from experiments.benchmarks.timing import measure_steps
from experiments.provenance import provenance, write_json
from skyformer_jax import attention, cli

_CONFIG = flags.DEFINE_string("config", "listops", "Name of a file in configs/.")
_VARIANT = flags.DEFINE_string("variant", "", "Variant of the config, small for example.")
_NAMES = (*attention.NAMES, "kernelized-dense")
_ATTENTIONS = flags.DEFINE_list("attentions", list(_NAMES), "Which to compare.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Default: the config's.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns that each attention takes.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1, "Steps timed in a turn.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "results/step_speed.json", "File to write.")


def _config(name: str) -> ml_collections.ConfigDict:
    get_config = importlib.import_module(f"configs.{_CONFIG.value}").get_config
    name, _, implementation = one_of("attention", name, _NAMES).partition("-")
    config = get_config(f"{name},{_VARIANT.value}")
    if implementation:
        config.attention.implementation = implementation
    config.train.batch_size = _BATCH_SIZE.value or config.train.batch_size
    return config


def main() -> None:
    """Compiles all, lets them take turns, prints a table and writes the JSON."""
    configs = {name: _config(name) for name in _ATTENTIONS.value}
    rows = measure_steps(configs, _ROUNDS.value, _CONFIG.value, calls_a_turn=_STEPS.value)
    for name, row in rows.items():
        if "skipped" in row:
            print(f"{name:18}{row['skipped']}")
        else:
            print(
                f"{name:18}{row['steps_per_second']:8.3f} steps/s"
                f"{row['temporaries_bytes'] / 2**20:10,.0f} MiB of temporaries"
            )
    config = next(iter(configs.values()))
    result = {
        "what": "training step of the full setting, random tokens at full length",
        "config": _CONFIG.value,
        "variant": _VARIANT.value,
        "batch_size": config.train.batch_size,
        "length": config.model.max_length,
        **provenance(jax.device_count()),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "steps_per_round": _STEPS.value,
        "attentions": rows,
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
