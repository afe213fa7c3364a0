r"""Seconds of a training step: of the attentions, or of the step's options, side by side.

    python -m experiments.benchmarks.step_speed --config=text --batch_size=4 --rounds=5 \
        --out=results/step_speed_text.json
    python -m experiments.benchmarks.step_speed --compare=options --rounds=5

--compare=attentions takes the training step of one config with each attention; kernelized-dense,
beside the nine, holds all scores.

--compare=options takes Skyformer's step in the paper's Text setting with one option changed at a
time; its step in the Image setting, whose batch is large, in parts and in one part; the
quickstart's step of one model and of three; and dropout, as the models have it and as Flax has it.
results/step_options.json holds more, which earlier code measured: several steps in a call, data
kept on the device, other generators and fused projections, of which nothing was kept. Choose
another --out to keep that.

Random tokens at the config's full length stand in for the data, on which the speed does not depend.
Everything is compiled ahead of time, which is timed apart, and takes turns in one process; medians
are reported. Writes JSON with commit, versions and hardware. --small takes the small variants of
the configs, batches of 2, two options of each group and one round.
"""

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from absl import flags

from experiments.benchmarks import common_flags
from experiments.benchmarks.timing import Row, as_text, measure_calls, measure_steps
from experiments.records import provenance, write_json
from skyformer_jax import attention, cli
from skyformer_jax.attention import random_bits
from skyformer_jax.errors import one_of

_NAMES = (*attention.NAMES, "kernelized-dense")
_COMPARE = flags.DEFINE_enum("compare", "attentions", ["attentions", "options"], "What.")
_CONFIG = flags.DEFINE_string("config", "listops", "Name of a file in configs/; of attentions.")
_VARIANT = flags.DEFINE_string("variant", "", "Variant of the config; of attentions.")
_ATTENTIONS = flags.DEFINE_list("attentions", list(_NAMES), "Which to compare.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Default: the config's.", lower_bound=1)
_ROUNDS = common_flags.rounds(3)
_SMALL = common_flags.small()
_OUT = flags.DEFINE_string(
    "out", None, "JSON to write; default: results/step_speed.json or results/step_options.json."
)

_ONE_PART = {"train.accumulation": 1}
_REMAT = {"model.remat": True}
_BFLOAT16 = {"model.dtype": "bfloat16"}
# Changes of a config, by the name of what they do.
_TEXT_OPTIONS = {
    "as it is": {},
    "bfloat16": _BFLOAT16,
    "remat": _REMAT,
    "no dropout": {"model.dropout": 0.0},
    "in one part": _ONE_PART,
    "in one part, bfloat16": _ONE_PART | _BFLOAT16,
    "in one part, remat": _ONE_PART | _REMAT,
    "in one part, both": _ONE_PART | _BFLOAT16 | _REMAT,
}
_IMAGE_OPTIONS = {"as it is": {}, "in one part": _ONE_PART}
_SEEDS = {f"{count} seed(s)": {"num_seeds": count} for count in (1, 3)}


def make_config(
    task: str, name: str, changes: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
    """A config as the flags say.

    Args:
      task: name of a file in configs/.
      name: of an attention; with -dense, in that implementation.
      changes: of fields, by their dotted names.
    """
    name, _, implementation = one_of("attention", name, _NAMES).partition("-")
    variant = "small" if _SMALL.value and task != "quickstart" else _VARIANT.value
    config = importlib.import_module(f"configs.{task}").get_config(f"{name},{variant}")
    if implementation:
        config.attention.implementation = implementation
    default = 2 if _SMALL.value else config.train.batch_size
    config.train.batch_size = _BATCH_SIZE.value or default
    config.update_from_flattened_dict(changes or {})
    return config


def measure_dropout() -> dict[str, Row]:
    """Seconds of dropout with gradients at [4096, 128], one part of a batch: ours, and Flax's."""

    def ours(x: jax.Array, key: jax.Array) -> jax.Array:
        return random_bits.dropout(key, x, 0.1)

    def of_flax(x: jax.Array, key: jax.Array) -> jax.Array:
        return nn.Dropout(0.1, deterministic=False).apply({}, x, rngs={"dropout": key})

    def gradients(dropout: Any, x: jax.Array, key: jax.Array, weights: jax.Array) -> Any:
        return jax.vjp(lambda x: dropout(x, key), x)[1](weights)

    x, weights = jax.random.normal(jax.random.key(0), (2, 1, 4096, 128))
    calls = {
        "dropout, ours": (functools.partial(gradients, ours), (x, jax.random.key(2), weights)),
        "dropout, Flax's": (functools.partial(gradients, of_flax), (x, jax.random.key(2), weights)),
    }
    return measure_calls(calls, _ROUNDS.value, "dropout")


def compare_options() -> dict[str, dict[str, Row]]:
    """Rows of each group of options, by the group's title."""
    groups = {
        "Text": ("text", _TEXT_OPTIONS),
        "Image": ("image", _IMAGE_OPTIONS),
        "quickstart": ("quickstart", _SEEDS),
    }
    found = {}
    for label, (task, options) in groups.items():
        names = list(options)[:2] if _SMALL.value else options
        configs = {name: make_config(task, "skyformer", options[name]) for name in names}
        first = next(iter(configs.values()))
        size, length = first.train.batch_size, first.model.max_length
        title = f"{label}, Skyformer, batch {size}, length {length}"
        found[title] = measure_steps(configs, _ROUNDS.value, label)
    return found | {"pieces of a layer, with gradients": measure_dropout()}


def compare_attentions() -> tuple[dict[str, Any], dict[str, Row]]:
    """What the steps of the attentions have in common, and a row for each attention."""
    configs = {name: make_config(_CONFIG.value, name) for name in _ATTENTIONS.value}
    first = next(iter(configs.values()))
    common = {
        "config": _CONFIG.value,
        "variant": "small" if _SMALL.value else _VARIANT.value,
        "batch_size": first.train.batch_size,
        "length": first.model.max_length,
    }
    return common, measure_steps(configs, _ROUNDS.value, _CONFIG.value)


def main() -> None:
    """Measures what is compared, writes the JSON and prints a table."""
    if _SMALL.value:
        flags.set_default(_ROUNDS, 1)
    if _COMPARE.value == "options":
        default = "results/step_options.json"
        what = (
            "seconds of a training step by options, random tokens at full length; with several "
            "seeds a step is that of all of them"
        )
        groups = compare_options()
        found = {"groups": groups}
    else:
        default = "results/step_speed.json"
        what = "training step of the full setting, random tokens at full length"
        common, rows = compare_attentions()
        groups, found = {_CONFIG.value: rows}, {**common, "attentions": rows}
    settings = {"seed": 0, "rounds": _ROUNDS.value, "small": _SMALL.value}
    result = {"what": what, **provenance(jax.device_count()), **settings, **found}
    write_json(Path(_OUT.value or default), result)
    for title, rows in groups.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:24}{as_text(row)}")


if __name__ == "__main__":
    cli.run(main)
