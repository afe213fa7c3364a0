"""How the speed experiments measure: compiled ahead of time, then turn about in one process."""

import concurrent.futures
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import ml_collections
import numpy as np

from skyformer_jax.data.batches import Batch
from skyformer_jax.models import build_model
from skyformer_jax.progress import track
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training import steps

K = TypeVar("K", bound=Hashable)
Program = jax.stages.Compiled

NOT_REACHED = "not reached: time"
# A call shorter than _SHORT seconds is repeated in its turn until _TURN seconds have passed; how
# often is reckoned from a second call where the first, which is slower, took less than _UNSURE.
_SHORT = 0.020
_TURN = 0.050
_UNSURE = 1.0


def attempt(action: Callable[[], Any], deadline: float) -> tuple[Any, str | None]:
    """What action returns, and None; or None, and in one line why there is nothing.

    Args:
      action: lowers, compiles or runs; a platform that cannot, or has no memory for it, raises.
      deadline: time.monotonic() after which it is not begun.
    """
    if time.monotonic() > deadline:
        return None, NOT_REACHED
    try:
        return action(), None
    except (RuntimeError, TypeError, ValueError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def compile_all(
    lowerings: Mapping[K, Callable[[], jax.stages.Lowered]],
    what: str,
    *,
    workers: int = 1,
    deadline: float = math.inf,
) -> tuple[dict[K, Program], dict[K, dict[str, Any]]]:
    """Compiles programs ahead of time; one that the platform refuses is recorded, not raised.

    Args:
      lowerings: what traces and lowers each program; called one after the other.
      what: names the work for the person who waits.
      workers: programs compiled at the same time. Seconds compare only where it is 1.
      deadline: time.monotonic() after which nothing more is begun.

    Returns:
      The programs that there are, and a row for every name: compile_seconds (tracing included),
      temporaries_bytes, argument_bytes, output_bytes and alias_bytes (of outputs that lie in
      arguments); or skipped, the reason.
    """

    def lower(name: K) -> tuple[jax.stages.Lowered, float]:
        start = time.perf_counter()
        return lowerings[name](), time.perf_counter() - start

    def compile_one(lowered: jax.stages.Lowered, seconds: float) -> tuple[Program, dict[str, Any]]:
        start = time.perf_counter()
        program = lowered.compile()
        memory = program.memory_analysis()
        return program, {
            "compile_seconds": seconds + time.perf_counter() - start,
            "temporaries_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
        }

    futures, programs, rows = {}, {}, {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for name in track(lowerings, len(lowerings), f"{what}, compiling", "programs"):
            lowered, reason = attempt(lambda name=name: lower(name), deadline)
            rows[name] = {"skipped": reason}
            if reason is None:
                futures[name] = pool.submit(
                    attempt, lambda lowered=lowered: compile_one(*lowered), deadline
                )
                if workers == 1:
                    concurrent.futures.wait([futures[name]])
    for name, future in futures.items():
        found, reason = future.result()
        if reason is None:
            programs[name], rows[name] = found
        else:
            rows[name] = {"skipped": reason}
    return programs, rows


def _seconds(call: Callable[[], Any], count: int) -> float:
    """Mean of so many calls of an asynchronous program, waited for at the end."""
    # On a CPU calls that are not waited for run beside each other.
    one_by_one = jax.default_backend() == "cpu"
    start = time.perf_counter()
    for _ in range(count):
        out = call()
        if one_by_one:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


def take_turns(
    calls: Mapping[K, Callable[[], Any]],
    rounds: int,
    what: str,
    *,
    calls_a_turn: int | None = None,
    max_seconds: float = math.inf,
    deadline: float = math.inf,
) -> dict[K, dict[str, Any]]:
    """Warms all calls, then times each once a round, so that their ratios are side by side.

    Args:
      calls: run a compiled program each.
      rounds: turns that each takes.
      what: names the work for the person who waits.
      calls_a_turn: how often it is called in a turn; None repeats short calls as often as it needs
        to time them.
      max_seconds: a call whose warming took longer takes no turns: that is its time.
      deadline: time.monotonic() after which nothing more is begun.

    Returns:
      For every name seconds, a list of the seconds of one call in each turn, and median_seconds;
      or skipped, the reason.
    """
    rows, counts = {}, {}
    for name, call in track(calls.items(), len(calls), f"{what}, warming", "programs"):
        seconds, reason = attempt(lambda call=call: _seconds(call, 1), deadline)
        if reason is not None:
            rows[name] = {"skipped": reason}
        elif seconds > max_seconds:
            rows[name] = {"seconds": [seconds]}
        else:
            rows[name] = {"seconds": []}
            if seconds < _UNSURE:
                seconds = _seconds(call, 1)
            counts[name] = calls_a_turn or (1 if seconds >= _SHORT else math.ceil(_TURN / seconds))
    for _ in track(range(rounds), rounds, f"{what}, timing", "rounds"):
        for name, count in counts.items():
            if time.monotonic() < deadline:
                rows[name]["seconds"].append(_seconds(calls[name], count))
    for name, row in rows.items():
        if row.get("seconds"):
            row["median_seconds"] = statistics.median(row["seconds"])
        elif "skipped" not in row:
            rows[name] = {"skipped": NOT_REACHED}
    return rows


def _random_batches(config: ml_collections.ConfigDict) -> Batch:
    """The batches of a call of the training step, [steps, seeds, batch]."""
    rng = np.random.default_rng(0)
    batches = (config.train.steps_per_call, config.num_seeds, config.train.batch_size)
    shape = (*batches, *steps.token_shape(config))
    return Batch(
        rng.integers(1, min(config.model.vocab_size, 256), shape, np.uint8),
        np.full(shape[:-1], config.model.max_length, np.int32),
        rng.integers(0, config.model.num_classes, batches, np.int32),
    )


def measure_steps(
    configs: Mapping[K, ml_collections.ConfigDict],
    rounds: int,
    what: str,
    *,
    calls_a_turn: int | None = None,
    workers: int = 1,
    deadline: float = math.inf,
) -> dict[K, dict[str, Any]]:
    """Times the training step of each config, on random tokens at its full length.

    With num_seeds a step is that of all models; with steps_per_call it is one of a call's.

    Args:
      configs: complete configurations.
      rounds: turns that each takes.
      what: names the work for the person who waits.
      calls_a_turn: calls timed in a turn; None as take_turns.
      workers: programs compiled at the same time.
      deadline: time.monotonic() after which nothing more is begun.

    Returns:
      For every name compile_seconds, temporaries_bytes, bytes (arguments and results as well),
      seconds_per_step, a list, median_seconds_per_step and steps_per_second; or skipped, the
      reason.
    """
    mesh = meshes.make_mesh()
    lowerings, batches = {}, {}
    for name, config in configs.items():
        model, optimizer = build_model(config), steps.make_optimizer(config)
        batches[name] = meshes.shard_batch(_random_batches(config), mesh, axis=2)
        replicated = meshes.replicated(mesh)
        init = jax.jit(
            lambda model=model, optimizer=optimizer, config=config: steps.init_states(
                range(config.num_seeds), model, optimizer, steps.token_shape(config)
            ),
            out_shardings=replicated,
        )
        states = jax.tree.map(
            lambda x, where=replicated: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(init),
        )
        step = steps.train_step_of(config, model, optimizer, mesh)
        lowerings[name, "init"] = init.lower
        lowerings[name, "step"] = lambda step=step, states=states, name=name: step.lower(
            states, batches[name]
        )
    programs, compiled = compile_all(lowerings, what, workers=workers, deadline=deadline)

    calls = {}
    for name in configs:
        if (name, "init") in programs and (name, "step") in programs:
            calls[name] = _training(programs[name, "step"], programs[name, "init"](), batches[name])
    turns = take_turns(calls, rounds, what, calls_a_turn=calls_a_turn, deadline=deadline)
    rows = {}
    for name, config in configs.items():
        row = compiled[name, "step"]
        found = turns.get(name, {"skipped": row.get("skipped", NOT_REACHED)})
        rows[name] = {k: row[k] for k in ("compile_seconds", "temporaries_bytes") if k in row}
        if "temporaries_bytes" in row:
            parts = ("temporaries_bytes", "argument_bytes", "output_bytes")
            rows[name]["bytes"] = sum(row[part] for part in parts) - row["alias_bytes"]
        if "skipped" in found:
            rows[name]["skipped"] = found["skipped"]
        else:
            in_a_call = config.train.steps_per_call
            rows[name] |= {
                "seconds_per_step": [seconds / in_a_call for seconds in found["seconds"]],
                "median_seconds_per_step": found["median_seconds"] / in_a_call,
                "steps_per_second": in_a_call / found["median_seconds"],
            }
    return rows


def _training(
    step: Program, states: steps.TrainState, batches: Batch
) -> Callable[[], dict[str, jax.Array]]:
    """A call that takes the next step and returns its sums."""

    def call() -> dict[str, jax.Array]:
        nonlocal states
        states, sums = step(states, batches)
        return sums

    return call
