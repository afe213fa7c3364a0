"""How the benchmarks measure: programs compiled ahead of time that take turns in one process."""

import concurrent.futures
import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import ml_collections
import numpy as np

from experiments.records import Row
from skyformer_jax.data.batches import Batch
from skyformer_jax.progress import track
from skyformer_jax.training.mesh import replicated, shard_batch
from skyformer_jax.training.run import Run, new_run
from skyformer_jax.training.sharded_step import make_train_step
from skyformer_jax.training.state import init_states

K = TypeVar("K", bound=Hashable)
Program = jax.stages.Compiled

NOT_REACHED = "not reached: time"
# A call shorter than _SHORT seconds is repeated in its turn until _TURN seconds have passed. The
# number of calls comes from the first call, or from a second one if the first, which is slower,
# took less than _UNSURE seconds.
_SHORT = 0.020
_TURN = 0.050
_UNSURE = 1.0


def attempt(action: Callable[[], Any], deadline: float) -> tuple[Any, str | None]:
    """Returns action() and None; or None and one line that says why there is nothing.

    Args:
      action: lowers, compiles or runs. It raises where the platform cannot, or lacks the memory.
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
) -> tuple[dict[K, Program], dict[K, Row]]:
    """Compiles programs ahead of time; one that the platform refuses is recorded, not raised.

    Args:
      lowerings: traces and lowers each program. They are called one after the other.
      what: names the work for the person who waits.
      workers: programs compiled at the same time. Compile seconds compare only if it is 1.
      deadline: time.monotonic() after which nothing more is begun.

    Returns:
      The programs that compiled, and a row for every name: compile_seconds (tracing included),
      temporaries_bytes, argument_bytes, output_bytes and alias_bytes (of outputs that share the
      memory of arguments); or skipped, the reason.
    """

    def lower(name: K) -> tuple[jax.stages.Lowered, float]:
        start = time.perf_counter()
        return lowerings[name](), time.perf_counter() - start

    def compile_one(lowered: jax.stages.Lowered, seconds: float) -> tuple[Program, Row]:
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
    """Mean seconds of `count` calls of an asynchronous program, which are waited for at the end."""
    # Calls on a CPU that are not waited for run beside each other.
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
    max_seconds: float = math.inf,
    deadline: float = math.inf,
) -> dict[K, Row]:
    """Warms all calls, then times each of them once a round, so that their times compare.

    Args:
      calls: run a compiled program each.
      rounds: turns that each call takes.
      what: names the work for the person who waits.
      max_seconds: a call whose warming takes longer takes no turns; its warming is its time.
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
            counts[name] = 1 if seconds >= _SHORT else math.ceil(_TURN / seconds)
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


def measure_calls(
    calls: Mapping[K, tuple[Callable[..., Any], tuple[Any, ...]]],
    rounds: int,
    what: str,
    *,
    reason_to_skip: Callable[[K, Row], str | None] = lambda name, row: None,
    workers: int = 1,
    max_seconds: float = math.inf,
    deadline: float = math.inf,
) -> dict[K, Row]:
    """Compiles functions for their arguments, then times them by turns.

    Args:
      calls: functions to be jitted, each with its arguments.
      rounds: turns that each takes.
      what: names the work for the person who waits.
      reason_to_skip: says of a name and its row of compile_all why the program is not to run, or
        None.
      workers: see compile_all.
      max_seconds: see take_turns.
      deadline: see both.

    Returns:
      For every name the fields of compile_all and of take_turns.
    """
    programs, rows = compile_all(
        {name: lambda f=f, x=x: jax.jit(f).lower(*x) for name, (f, x) in calls.items()},
        what,
        workers=workers,
        deadline=deadline,
    )
    for name in list(programs):
        if reason := reason_to_skip(name, rows[name]):
            rows[name]["skipped"] = reason
            del programs[name]
    turns = take_turns(
        {name: lambda p=p, x=calls[name][1]: p(*x) for name, p in programs.items()},
        rounds,
        what,
        max_seconds=max_seconds,
        deadline=deadline,
    )
    return {name: row | turns.get(name, {}) for name, row in rows.items()}


def random_batch(run: Run) -> Batch:
    """A batch [seeds, batch, ...] of random tokens and labels at full length, on the mesh."""
    rng, model = np.random.default_rng(0), run.config.model
    size = (len(run.seeds), run.config.train.batch_size)
    shape = (*size, *run.token_shape)
    batch = Batch(
        rng.integers(1, min(model.vocab_size, 256), shape, np.uint8),
        np.full(shape[:-1], model.max_length, np.int32),
        rng.integers(0, model.num_classes, size, np.int32),
    )
    return shard_batch(batch, run.mesh, axis=1)


def lower_train_step(run: Run, batch: Batch) -> jax.stages.Lowered:
    """Lowers the training step for a batch on the mesh, without computing states."""
    states = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(run.mesh)),
        jax.eval_shape(functools.partial(init_states, run)),
    )
    return make_train_step(run).lower(states, batch)


def _training(step: Program, init: Program, batch: Batch) -> Callable[[], Any]:
    """A call that takes the next step and returns its sums."""
    states = init()

    def call() -> dict[str, jax.Array]:
        nonlocal states
        states, sums = step(states, batch)
        return sums

    return call


def time_steps(
    runs: Mapping[K, Run],
    rounds: int,
    what: str,
    *,
    workers: int = 1,
    deadline: float = math.inf,
) -> dict[K, Row]:
    """Times the training step of each run on random_batch. With num_seeds, that of all models.

    Args:
      runs: of complete configurations.
      rounds: turns that each takes.
      what: names the work for the person who waits.
      workers: see compile_all.
      deadline: see both.

    Returns:
      For every name the fields of compile_all, for the step, and of take_turns.
    """
    batches = {name: random_batch(run) for name, run in runs.items()}
    lowerings = {}
    for name, run in runs.items():
        init = functools.partial(init_states, run)
        lowerings[name, "init"] = jax.jit(init, out_shardings=replicated(run.mesh)).lower
        lowerings[name, "step"] = functools.partial(lower_train_step, run, batches[name])
    programs, compiled = compile_all(lowerings, what, workers=workers, deadline=deadline)
    calls = {
        name: _training(programs[name, "step"], programs[name, "init"], batches[name])
        for name in runs
        if {(name, "step"), (name, "init")} <= programs.keys()
    }
    turns = take_turns(calls, rounds, what, deadline=deadline)
    # The row of a program that was refused holds the reason alone.
    return {name: turns.get(name, compiled[name, "init"]) | compiled[name, "step"] for name in runs}


def measure_steps(
    configs: Mapping[K, ml_collections.ConfigDict], rounds: int, what: str, **options: Any
) -> dict[K, Row]:
    """time_steps of configs on all devices, with the fields that results have for training steps.

    Raises:
      UserError: for the first thing in a config that cannot work.

    Returns:
      For every name compile_seconds, temporaries_bytes, bytes (arguments and results as well),
      seconds_per_step, a list, median_seconds_per_step and steps_per_second; or skipped, the
      reason.
    """
    rows, runs = {}, {name: new_run(config) for name, config in configs.items()}
    for name, found in time_steps(runs, rounds, what, **options).items():
        row = {k: found[k] for k in ("compile_seconds", "temporaries_bytes") if k in found}
        if "temporaries_bytes" in found:
            fields = ("temporaries_bytes", "argument_bytes", "output_bytes")
            row["bytes"] = sum(found[field] for field in fields) - found["alias_bytes"]
        if "skipped" in found:
            row["skipped"] = found["skipped"]
        else:
            row["seconds_per_step"] = found["seconds"]
            row["median_seconds_per_step"] = found["median_seconds"]
            row["steps_per_second"] = 1 / found["median_seconds"]
        rows[name] = row
    return rows


def as_text(row: Row) -> str:
    """Milliseconds and MiB of temporaries of a row, or why it was skipped."""
    if "skipped" in row:
        return row["skipped"]
    seconds = row.get("median_seconds_per_step", row.get("median_seconds"))
    return f"{1e3 * seconds:12,.2f} ms{row['temporaries_bytes'] / 2**20:12,.1f} MiB of temporaries"
