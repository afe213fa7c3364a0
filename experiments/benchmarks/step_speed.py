r"""Measures the seconds of a training step: of the attentions, or of options, side by side.

    python -m experiments.benchmarks.step_speed --config=text --batch_size=4 --rounds=5 \
        --out=results/step_speed_text.json
    python -m experiments.benchmarks.step_speed --compare=options --rounds=5

--compare=attentions measures the training step of one config with each attention, and with
kernelized-dense, which stores all scores.

--compare=options measures Skyformer's step in the paper's Text setting with different options; its
step in the Image setting, whose batch is large, in parts and in one part; the quickstart's step of
one model and of three; and dropout, that of the models and that of Flax. results/step_options.json
has further measurements of earlier code that was not kept: several steps in a call, data kept on
the device, other generators and fused projections. Choose another --out to keep these.

The steps use random tokens at the config's full length, because the speed does not depend on the
data. Everything is compiled ahead of time, with the compilation timed separately, and takes turns
in one process; medians are reported. Writes JSON with commit, versions and hardware. --small uses
the small variants of the configs, batches of 2, two options of each group and one round.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from absl import flags

from experiments.benchmarks import common_flags
from experiments.benchmarks.timing import as_text, measure_calls, measure_steps
from experiments.records import Row, provenance, write_json
from skyformer_jax import attention, cli
from skyformer_jax.attention import random_bits

_COMPARE = flags.DEFINE_enum("compare", "attentions", ["attentions", "options"], "What to compare.")
_CONFIG = flags.DEFINE_string("config", "listops", "File of configs/, for --compare=attentions.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Examples in a batch; default: the config's.", lower_bound=1
)
_ROUNDS = common_flags.rounds(3)
_SMALL = common_flags.small()
_OUT = flags.DEFINE_string(
    "out", None, "JSON to write; default: results/step_speed.json or results/step_options.json."
)

_ONE_PART = {"train.accumulation": 1}
_REMAT = {"model.remat": True}
_BFLOAT16 = {"model.dtype": "bfloat16"}
# The options of each group: overrides of the config by the name of the option.
_OPTIONS = {
    "text": {
        "as it is": {},
        "bfloat16": _BFLOAT16,
        "remat": _REMAT,
        "no dropout": {"model.dropout": 0.0},
        "in one part": _ONE_PART,
        "in one part, bfloat16": _ONE_PART | _BFLOAT16,
        "in one part, remat": _ONE_PART | _REMAT,
        "in one part, both": _ONE_PART | _BFLOAT16 | _REMAT,
    },
    "image": {"as it is": {}, "in one part": _ONE_PART},
    "quickstart": {f"{count} seed(s)": {"num_seeds": count} for count in (1, 3)},
}


def make_config(task: str, name: str, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns a config of configs/ with the flags' settings and overrides by dotted names."""
    variant = "small" if _SMALL.value and task != "quickstart" else ""
    config = importlib.import_module(f"configs.{task}").get_config(f"{name},{variant}")
    if _BATCH_SIZE.value or _SMALL.value:
        config.train.batch_size = _BATCH_SIZE.value or 2
    config.update_from_flattened_dict(changes)
    return config


def measure_dropout() -> dict[str, Row]:
    """Measures dropout with gradients at [4096, 128], one part of a batch: ours and Flax's."""

    def gradients(dropout: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, key, weights: jax.vjp(lambda x: dropout(x, key), x)[1](weights)

    def of_flax(x: jax.Array, key: jax.Array) -> jax.Array:
        return nn.Dropout(0.1, deterministic=False).apply({}, x, rngs={"dropout": key})

    x, weights = jax.random.normal(jax.random.key(0), (2, 1, 4096, 128))
    arguments = (x, jax.random.key(2), weights)
    calls = {
        "dropout, ours": (gradients(lambda x, key: random_bits.dropout(key, x, 0.1)), arguments),
        "dropout, Flax's": (gradients(of_flax), arguments),
    }
    return measure_calls(calls, _ROUNDS.value, "dropout")


def compare_options() -> dict[str, Any]:
    """Measures all options; returns the rows of each group, by the title of the group."""
    groups = {}
    for task, options in _OPTIONS.items():
        names = list(options)[: 2 if _SMALL.value else None]
        configs = {name: make_config(task, "skyformer", options[name]) for name in names}
        size, length = configs[names[0]].train.batch_size, configs[names[0]].model.max_length
        label = task if task == "quickstart" else task.capitalize()
        title = f"{label}, Skyformer, batch {size}, length {length}"
        groups[title] = measure_steps(configs, _ROUNDS.value, label)
    groups["pieces of a layer, with gradients"] = measure_dropout()
    return {
        "what": "seconds of a training step by options, random tokens at full length; with "
        "several seeds a step is that of all of them",
        "groups": groups,
    }


def compare_attentions() -> dict[str, Any]:
    """Measures all attentions; returns their common settings, and a row for each."""
    configs = {name: make_config(_CONFIG.value, name, {}) for name in attention.NAMES}
    dense = {"attention.implementation": "dense"}
    configs["kernelized-dense"] = make_config(_CONFIG.value, "kernelized", dense)
    return {
        "what": "training step of the full setting, random tokens at full length",
        "config": _CONFIG.value,
        "variant": "small" if _SMALL.value else "",
        "batch_size": configs["softmax"].train.batch_size,
        "length": configs["softmax"].model.max_length,
        "attentions": measure_steps(configs, _ROUNDS.value, _CONFIG.value),
    }


def main() -> None:
    """Measures what --compare asks for, writes the JSON and prints a table."""
    if _SMALL.value:
        common_flags.set_defaults(rounds=1)
    if _COMPARE.value == "options":
        found, default = compare_options(), "results/step_options.json"
        groups = found["groups"]
    else:
        found, default = compare_attentions(), "results/step_speed.json"
        groups = {_CONFIG.value: found["attentions"]}
    settings = {"seed": 0, "rounds": _ROUNDS.value, "small": _SMALL.value}
    write_json(Path(_OUT.value or default), provenance(jax.device_count()) | settings | found)
    for title, rows in groups.items():
        print(title)
        print(as_text([{"name": f"{name:24}", **row} for name, row in rows.items()], "name"))


if __name__ == "__main__":
    cli.run(main)
