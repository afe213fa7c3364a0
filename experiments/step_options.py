"""What each option of a training step, and each choice made inside it, gains: side by side.

    python experiments/step_options.py

Steps of Skyformer in the paper's Text setting, with one option changed at a time, on random tokens
at full length; of a model so small that Python takes its part, with the data's way to the device in
the time; and two pieces of a layer, in the form that is used and in those that are not. Everything
is compiled ahead of time and takes turns in one process; medians are reported, with commit,
versions and hardware.
"""

import collections
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from configs import quickstart, text
from experiments.provenance import provenance
from experiments.timing import compile_all, measure_steps, take_turns, write_json
from skyformer_jax import cli, models
from skyformer_jax.data.batches import Examples, stacked_batches, training_batches
from skyformer_jax.training import evaluation, steps

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Of the Text steps.", lower_bound=4)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns that each takes.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "results/step_options.json", "File to write.")

# Steps of a turn of the small model, and how many of its calls may be under way.
_SMALL_STEPS = 400
_IN_FLIGHT = 8

Row = dict[str, Any]


def text_config(**changes: Any) -> ml_collections.ConfigDict:
    """The paper's Text setting with Skyformer, with fields changed."""
    config = text.get_config("skyformer")
    config.train.batch_size = _BATCH_SIZE.value
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def text_steps() -> dict[str, Row]:
    """Seconds and temporaries of a step with each option."""
    configs = {
        "as it is": text_config(),
        "accumulation=4": text_config(train__accumulation=4),
        "remat": text_config(model__remat=True),
        "bfloat16": text_config(model__dtype="bfloat16"),
        "bfloat16, remat": text_config(model__dtype="bfloat16", model__remat=True),
        "no dropout": text_config(model__dropout=0.0),
    }
    return measure_steps(configs, _ROUNDS.value, "text")


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    """A model of some 2 ms a step."""
    config = quickstart.get_config("linformer")
    config.model.update({"num_layers": 1, "width": 16, "head_dim": 8, "mlp_dim": 16})
    config.attention.num_features = 8
    config.train.batch_size = 16
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def _random_examples(config: ml_collections.ConfigDict, count: int = 2000) -> Examples:
    rng = np.random.default_rng(0)
    length = config.model.max_length
    return Examples(
        rng.integers(1, config.model.vocab_size, count * length, np.uint8),
        np.arange(count + 1, dtype=np.int64) * length,
        rng.integers(0, config.model.num_classes, count, np.int32),
    )


def _run_small(config: ml_collections.ConfigDict) -> Callable[[], jax.Array]:
    """A call that takes _SMALL_STEPS steps as training does, reading and shipping included."""
    model, optimizer = models.build_model(config), steps.make_optimizer(config)
    mesh = steps.make_mesh()
    seeds = range(config.num_seeds)
    examples = _random_examples(config)
    streams = [
        training_batches(examples, config.train.batch_size, config.model.max_length, seed=seed)
        for seed in seeds
    ]
    states = steps.init_states(seeds, model, optimizer, steps.token_shape(config))
    step = steps.make_train_step(
        model, optimizer, mesh, config.train.log_every, evaluation.reading(config)
    )

    def call() -> jax.Array:
        nonlocal states
        under_way = collections.deque()
        for _ in range(_SMALL_STEPS // config.train.steps_per_call):
            batch = stacked_batches(streams, config.train.steps_per_call)
            states, sums = step(states, steps.shard_batch(batch, mesh, axis=2))
            under_way.append(sums)
            if len(under_way) > _IN_FLIGHT:
                jax.block_until_ready(under_way.popleft())
        return states.step

    return call


def small_steps() -> dict[str, Row]:
    """Seconds of a step of the small model, for steps a call and for seeds at once."""
    configs = {
        "1 step a call": tiny_config(),
        "10 steps a call": tiny_config(train__steps_per_call=10),
        "50 steps a call": tiny_config(train__steps_per_call=50),
        "3 seeds, 1 step a call": tiny_config(num_seeds=3),
        "3 seeds, 10 steps a call": tiny_config(num_seeds=3, train__steps_per_call=10),
    }
    calls = {name: _run_small(config) for name, config in configs.items()}
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


def _flax_dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    return nn.Dropout(rate, deterministic=False).apply({}, x, rngs={"dropout": key})


def _projected(fused: bool, x: jax.Array, kernels: jax.Array) -> tuple[jax.Array, ...]:
    if fused:
        return tuple(jnp.split(x @ jnp.concatenate(list(kernels), axis=1), 3, axis=-1))
    return tuple(x @ kernel for kernel in kernels)


def pieces() -> dict[str, Row]:
    """Seconds of pieces of a layer at [batch, 4096, 64 or 128], with gradients."""
    batch = _BATCH_SIZE.value
    x = jax.random.normal(jax.random.key(0), (batch, 4096, 128))
    narrow = x[..., :64]
    kernels = jax.random.normal(jax.random.key(1), (3, 64, 64))
    programs = {
        "dropout, ours": (models.dropout, (jax.random.key(2), x)),
        "dropout, Flax's": (_flax_dropout, (jax.random.key(2), x)),
        "dropout, Flax's by rbg": (_flax_dropout, (jax.random.key(2, impl="rbg"), x)),
        "projections, three": (functools.partial(_projected, False), (narrow, kernels)),
        "projections, fused": (functools.partial(_projected, True), (narrow, kernels)),
    }
    lowerings, arguments = {}, {}
    for name, (function, given) in programs.items():
        if name.startswith("dropout"):

            def loss(x: jax.Array, key: jax.Array, function: Any = function) -> jax.Array:
                return (function(key, x, 0.1) * jnp.sin(x)).sum()

            arguments[name] = given[::-1]
            lowered = jax.jit(jax.value_and_grad(loss))
        else:

            def loss(x: jax.Array, kernels: jax.Array, function: Any = function) -> jax.Array:
                return sum(jnp.sin(y).sum() for y in function(x, kernels))

            arguments[name] = given
            lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        lowerings[name] = functools.partial(lowered.lower, *arguments[name])
    compiled, rows = compile_all(lowerings, "pieces")
    calls = {n: functools.partial(program, *arguments[n]) for n, program in compiled.items()}
    turns = take_turns(calls, _ROUNDS.value, "pieces")
    return {name: rows[name] | turns.get(name, {}) for name in rows}


def main() -> None:
    """Measures all, prints the tables and writes the JSON."""
    groups = {
        f"Text, Skyformer, batch {_BATCH_SIZE.value}, length 4096": text_steps(),
        "small Linformer, batch 16, length 48, input included": small_steps(),
        "quickstart, Skyformer, batch 128, length 48": seeds_of_the_quickstart(),
        "pieces of a layer, with gradients": pieces(),
    }
    for title, rows in groups.items():
        print(title)
        for name, row in rows.items():
            seconds = row.get("median_seconds_per_step", row.get("median_seconds"))
            memory = row.get("temporaries_bytes")
            print(
                f"  {name:28}{1e3 * seconds:10.2f} ms"
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
