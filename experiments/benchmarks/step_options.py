"""What each option of a training step, and each choice made inside it, gains: side by side.

    python -m experiments.benchmarks.step_options

Steps of Skyformer in the paper's Text setting, with one option changed at a time, on random tokens
at full length; of a model so small that Python takes its part, with the data's way to the device in
the time; and two pieces of a layer, in the form that is used and in those that are not. Everything
is compiled ahead of time and takes turns in one process; medians are reported, with commit,
versions and hardware.
"""

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from configs import image, quickstart, text
from experiments.benchmarks.timing import compile_all, measure_steps, take_turns
from experiments.provenance import provenance, write_json
from skyformer_jax import cli, models
from skyformer_jax.data.batches import stacked, training_batches, training_rows
from skyformer_jax.data.examples import Examples
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training import steps

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns that each takes.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "results/step_options.json", "File to write.")

# Steps of a turn of the small model, and how many of its calls may be under way.
_SMALL_STEPS = 400
_IN_FLIGHT = 8

Row = dict[str, Any]


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
_SMALL_OPTIONS = {
    f"{seeds} seed(s), {count} step(s) a call": {
        "num_seeds": seeds,
        "train.steps_per_call": count,
    }
    for seeds in (1, 3)
    for count in (1, 10, 50)
}


def changed(
    config: ml_collections.ConfigDict, changes: dict[str, Any]
) -> ml_collections.ConfigDict:
    """The config with the fields of that name changed."""
    config.update_from_flattened_dict(changes)
    return config


def text_steps() -> dict[str, Row]:
    """Seconds and temporaries of a step with each option."""
    configs = {
        name: changed(text.get_config("skyformer"), changes)
        for name, changes in _TEXT_OPTIONS.items()
    }
    return measure_steps(configs, _ROUNDS.value, "text")


def image_steps() -> dict[str, Row]:
    """Seconds and temporaries of a step of a large batch, in parts and at once."""
    configs = {
        "as it is": image.get_config("skyformer"),
        "in one part": changed(image.get_config("skyformer"), _ONE_PART),
    }
    return measure_steps(configs, min(3, _ROUNDS.value), "image")


def tiny_config() -> ml_collections.ConfigDict:
    """A model of some tenths of a millisecond a step."""
    config = quickstart.get_config("linformer")
    config.model.update({"num_layers": 1, "width": 16, "head_dim": 8, "mlp_dim": 16})
    config.attention.num_features = 8
    config.train.batch_size = 2
    return config


def _random_examples(config: ml_collections.ConfigDict, count: int = 2000) -> Examples:
    rng = np.random.default_rng(0)
    length = config.model.max_length
    return Examples(
        rng.integers(1, config.model.vocab_size, count * length, np.uint8),
        np.arange(count + 1, dtype=np.int64) * length,
        rng.integers(0, config.model.num_classes, count, np.int32),
    )


def _run_small(config: ml_collections.ConfigDict, on_device: bool) -> Callable[[], jax.Array]:
    """A call that takes _SMALL_STEPS steps as training does, reading and shipping included."""
    model, optimizer = models.build_model(config), steps.make_optimizer(config)
    mesh = meshes.make_mesh()
    seeds = range(config.num_seeds)
    examples = _random_examples(config)
    size, length = config.train.batch_size, config.model.max_length
    table = steps.make_table(examples, mesh) if on_device else None
    streams = [
        training_batches(examples, size, length, seed=seed)
        if table is None
        else training_rows(len(examples), size, seed=seed)
        for seed in seeds
    ]
    states = steps.init_states(seeds, model, optimizer, steps.token_shape(config))
    step = steps.train_step_of(config, model, optimizer, mesh)

    def call() -> jax.Array:
        nonlocal states
        under_way = collections.deque()
        for _ in range(_SMALL_STEPS // config.train.steps_per_call):
            batch = stacked(streams, config.train.steps_per_call)
            states, sums = step(states, meshes.shard_batch(batch, mesh, axis=2), table)
            under_way.append(sums)
            if len(under_way) > _IN_FLIGHT:
                jax.block_until_ready(under_way.popleft())
        return states.step

    return call


def small_steps() -> dict[str, Row]:
    """Seconds of a step of the small model, for steps a call and for seeds at once."""
    calls = {
        f"{name}, data on the {'device' if on_device else 'host'}": _run_small(
            changed(tiny_config(), changes), on_device
        )
        for name, changes in _SMALL_OPTIONS.items()
        for on_device in (False, True)
    }
    rows = take_turns(calls, _ROUNDS.value, "small model", calls_a_turn=1)
    return {
        name: {
            "seconds_per_step": [s / _SMALL_STEPS for s in row["seconds"]],
            "median_seconds_per_step": row["median_seconds"] / _SMALL_STEPS,
        }
        for name, row in rows.items()
    }


def seeds_of_the_quickstart() -> dict[str, Row]:
    """Seconds of a step of the quickstart's Skyformer, alone and with two others."""
    configs = {}
    for num_seeds in (1, 3):
        config = quickstart.get_config("skyformer")
        config.num_seeds = num_seeds
        configs[f"{num_seeds} seed(s)"] = config
    return measure_steps(configs, _ROUNDS.value, "quickstart")


def _flax_dropout(key: jax.Array, x: jax.Array) -> jax.Array:
    return nn.Dropout(0.1, deterministic=False).apply({}, x, rngs={"dropout": key})


def _our_dropout(key: jax.Array, x: jax.Array) -> jax.Array:
    return models.dropout(key, x, 0.1)


def _projected(fused: bool, x: jax.Array, kernels: jax.Array) -> tuple[jax.Array, ...]:
    if fused:
        return tuple(jnp.split(x @ jnp.concatenate(list(kernels), axis=1), 3, axis=-1))
    return tuple(x @ kernel for kernel in kernels)


def pieces() -> dict[str, Row]:
    """Seconds of pieces of a layer at [4096, 64 or 128], one part of a batch, with gradients."""
    x = jax.random.normal(jax.random.key(0), (1, 4096, 128))
    narrow = x[..., :64]
    kernels = jax.random.normal(jax.random.key(1), (3, 64, 64))
    programs = {
        "dropout, ours": (_our_dropout, (jax.random.key(2), x)),
        "dropout, Flax's": (_flax_dropout, (jax.random.key(2), x)),
        "dropout, Flax's by rbg": (_flax_dropout, (jax.random.key(2, impl="rbg"), x)),
        "projections, three": (functools.partial(_projected, False), (narrow, kernels)),
        "projections, fused": (functools.partial(_projected, True), (narrow, kernels)),
    }
    lowerings, arguments = {}, {}
    for name, (function, given) in programs.items():
        out = jax.eval_shape(function, *given)
        weights = jax.tree.map(lambda y: jax.random.normal(jax.random.key(3), y.shape), out)
        arguments[name] = (*given, weights)

        def gradients(*given: Any, function: Any = function) -> Any:
            first, *inputs, weights = given
            if function in (_our_dropout, _flax_dropout):
                _, pull = jax.vjp(lambda x: function(first, x), *inputs)
            else:
                _, pull = jax.vjp(function, first, *inputs)
            return pull(weights)

        lowerings[name] = functools.partial(jax.jit(gradients).lower, *arguments[name])
    compiled, rows = compile_all(lowerings, "pieces")
    calls = {n: functools.partial(program, *arguments[n]) for n, program in compiled.items()}
    turns = take_turns(calls, _ROUNDS.value, "pieces")
    return {name: rows[name] | turns.get(name, {}) for name in rows}


def main() -> None:
    """Measures all, prints the tables and writes the JSON."""
    groups = {
        "Text, Skyformer, batch 16, length 4096": text_steps(),
        "Image, Skyformer, batch 256, length 1024": image_steps(),
        "small Linformer, batch 2, length 48, input included": small_steps(),
        "quickstart, Skyformer, batch 128, length 48": seeds_of_the_quickstart(),
        "pieces of a layer, with gradients": pieces(),
    }
    for title, rows in groups.items():
        print(title)
        for name, row in rows.items():
            seconds = row.get("median_seconds_per_step", row.get("median_seconds"))
            memory = row.get("temporaries_bytes")
            print(
                f"  {name:48}{1e3 * seconds:10.2f} ms"
                + ("" if memory is None else f"{memory / 2**20:10,.0f} MiB of temporaries")
            )
    result = {
        "what": "seconds of a training step by options, random tokens at full length; with several "
        "seeds a step is that of all of them",
        **provenance(jax.device_count()),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "groups": groups,
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
