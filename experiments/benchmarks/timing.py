"""Times programs that are compiled ahead of time and take turns in one process."""

import concurrent.futures
import functools
import math
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from experiments.records import Row
from skyformer_jax.data.batches import Batch
from skyformer_jax.progress import track
from skyformer_jax.training.mesh import batch_specs, replicated, shard_batch
from skyformer_jax.training.run import Run, new_run
from skyformer_jax.training.sharded_step import make_train_step
from skyformer_jax.training.state import init_states

K = TypeVar("K", bound=Hashable)
Program = jax.stages.Compiled
Lower = Callable[[], jax.stages.Lowered]
MakeCall = Callable[[Program], Callable[[], Any]]
Job = tuple[Lower, MakeCall]

NOT_REACHED = "not reached: time"
# A call shorter than _SHORT seconds is repeated in its turn until _TURN seconds have passed. The
# number of calls comes from the first call, or from a second one if the first, which is slower,
# took less than _UNSURE seconds.
_SHORT = 0.020
_TURN = 0.050
_UNSURE = 1.0


def attempt(action: Callable[[], Any], deadline: float) -> tuple[Any, str | None]:
    """Returns action() and None, or None and one line that says why it failed or was not reached.

    Args:
      action: lowers, compiles or runs a program. It raises an exception if the platform cannot, or
        lacks the memory.
      deadline: time.monotonic() after which the action is not started.
    """
    if time.monotonic() > deadline:
        return None, NOT_REACHED
    try:
        return action(), None
    except Exception as error:  # compilers raise exceptions of their own
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def memory(program: Program) -> Row:
    """Returns a program's bytes on a device; alias_bytes: outputs in the memory of arguments."""
    found = program.memory_analysis()
    return {
        "temporaries_bytes": found.temp_size_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "alias_bytes": found.alias_size_in_bytes,
    }


def _compile_all(
    jobs: Mapping[K, Job], what: str, workers: int, deadline: float
) -> tuple[dict[K, Callable[[], Any]], dict[K, Row]]:
    """Compiles all jobs; returns calls of the programs that compiled, and a row for every name."""
    one_traces = threading.Lock()

    def compile_one(lower: Lower, make_call: MakeCall) -> tuple[Callable[[], Any], Row]:
        with one_traces:
            start = time.perf_counter()
            lowered = lower()
        program = lowered.compile()
        seconds = time.perf_counter() - start
        return make_call(program), {"compile_seconds": seconds, **memory(program)}

    calls, rows = {}, {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda job: attempt(lambda: compile_one(*job), deadline), jobs.values())
        for name, (found, reason) in track(
            zip(jobs, results, strict=True), len(jobs), f"{what}, compiling", "programs"
        ):
            if reason is None:
                calls[name], rows[name] = found
            else:
                rows[name] = {"skipped": reason}
    return calls, rows


def _seconds(call: Callable[[], Any], count: int) -> float:
    """Returns the mean seconds of `count` asynchronous calls, which are waited for at the end."""
    start = time.perf_counter()
    for _ in range(count):
        out = call()
        # On a CPU, calls that are not waited for run concurrently.
        if next(iter(jax.tree.leaves(out)[0].devices())).platform == "cpu":
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


def _take_turns(
    calls: Mapping[K, Callable[[], Any]],
    rounds: int,
    what: str,
    max_seconds: float,
    deadline: float,
) -> dict[K, Row]:
    """Warms up all calls, then times each once a round, so that their times are comparable."""
    rows, counts = {}, {}
    for name, call in track(calls.items(), len(calls), f"{what}, warming", "programs"):
        seconds, reason = attempt(functools.partial(_seconds, call, 1), deadline)
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


def measure(
    jobs: Mapping[K, Job],
    rounds: int,
    what: str,
    *,
    reason_to_skip: Callable[[K, Row], str | None] = lambda name, row: None,
    workers: int = 1,
    max_seconds: float = math.inf,
    deadline: float = math.inf,
) -> dict[K, Row]:
    """Compiles programs ahead of time, then times them in turns.

    A program that the platform refuses is recorded with the reason, and nothing is raised.

    Args:
      jobs: for each program a function that traces and lowers it, called one at a time, and a
        function that returns the call to be timed, given the compiled program.
      rounds: turns that each program takes.
      what: description of the work for the progress bars.
      reason_to_skip: returns why a program is not to be run, given its name and its row after
        compilation, or None to run it.
      workers: programs compiled at the same time. Compile seconds are comparable only if it is 1.
      max_seconds: a call whose warm-up takes longer takes no turns; the warm-up is its time.
      deadline: time.monotonic() after which nothing more is started.

    Returns:
      For every name: compile_seconds (including tracing), the fields of memory, seconds (a list
      with the seconds of one call in each turn), and median_seconds. If some of these are missing,
      skipped has the reason.
    """
    calls, rows = _compile_all(jobs, what, workers, deadline)
    for name in list(calls):
        if reason := reason_to_skip(name, rows[name]):
            rows[name]["skipped"] = reason
            del calls[name]
    turns = _take_turns(calls, rounds, what, max_seconds, deadline)
    return {name: row | turns.get(name, {}) for name, row in rows.items()}


def measure_calls(
    calls: Mapping[K, tuple[Callable[..., Any], tuple[Any, ...]]],
    rounds: int,
    what: str,
    **options: Any,
) -> dict[K, Row]:
    """Jits functions and measures them, each with its arguments."""

    def job(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Job:
        lower = functools.partial(jax.jit(function).lower, *arguments)
        return lower, lambda program: functools.partial(program, *arguments)

    return measure({name: job(*call) for name, call in calls.items()}, rounds, what, **options)


def random_batch(run: Run) -> Batch:
    """Returns a batch [seeds, batch, ...] of random tokens and labels, full length, on the mesh."""
    rng, model = np.random.default_rng(0), run.config.model
    size = (len(run.seeds), run.config.train.batch_size)
    shape = (*size, *run.token_shape)
    batch = Batch(
        rng.integers(1, min(model.vocab_size, 256), shape, np.uint8),
        np.full(shape[:-1], model.max_length, np.int32),
        rng.integers(0, model.num_classes, size, np.int32),
    )
    return shard_batch(batch, run.mesh, axis=1)


def abstract_batch(run: Run) -> Batch:
    """Returns the shapes, dtypes and shardings of random_batch, without its arrays."""
    size = (len(run.seeds), run.config.train.batch_size)
    tokens = (*size, *run.token_shape)
    batch = Batch(
        jax.ShapeDtypeStruct(tokens, np.uint8),
        jax.ShapeDtypeStruct(tokens[:-1], np.int32),
        jax.ShapeDtypeStruct(size, np.int32),
    )
    specs = batch_specs(batch, axis=1)
    return jax.tree.map(
        lambda x, spec: x.update(sharding=NamedSharding(run.mesh, spec)), batch, specs
    )


def lower_train_step(run: Run, batch: Batch) -> jax.stages.Lowered:
    """Lowers the training step for a batch on the mesh, without computing states."""
    states = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(run.mesh)),
        jax.eval_shape(functools.partial(init_states, run)),
    )
    return make_train_step(run).lower(states, batch)


def time_steps(runs: Mapping[K, Run], rounds: int, what: str, **options: Any) -> dict[K, Row]:
    """Measures each run's training step on a random batch, of all seeds together."""

    def job(run: Run) -> Job:
        batch = random_batch(run)

        def make_call(step: Program) -> Callable[[], Any]:
            states = init_states(run)

            def call() -> dict[str, jax.Array]:
                nonlocal states
                states, sums = step(states, batch)
                return sums

            return call

        return functools.partial(lower_train_step, run, batch), make_call

    return measure({name: job(run) for name, run in runs.items()}, rounds, what, **options)


def measure_steps(
    configs: Mapping[K, ml_collections.ConfigDict], rounds: int, what: str, **options: Any
) -> dict[K, Row]:
    """Measures the training steps of configs on all devices, by time_steps.

    Raises:
      UserError: for the first field of a config that cannot work.

    Returns:
      For every name: compile_seconds, temporaries_bytes, bytes (temporaries, arguments and
      results), seconds_per_step (a list), median_seconds_per_step and steps_per_second; or
      skipped, the reason.
    """
    rows, runs = {}, {name: new_run(config) for name, config in configs.items()}
    for name, found in time_steps(runs, rounds, what, **options).items():
        kept = ("compile_seconds", "temporaries_bytes", "skipped")
        rows[name] = row = {field: found[field] for field in kept if field in found}
        if "temporaries_bytes" in found:
            fields = ("temporaries_bytes", "argument_bytes", "output_bytes")
            row["bytes"] = sum(found[field] for field in fields) - found["alias_bytes"]
        if "skipped" not in found:
            row["seconds_per_step"] = found["seconds"]
            row["median_seconds_per_step"] = found["median_seconds"]
            row["steps_per_second"] = 1 / found["median_seconds"]
    return rows


def as_text(rows: Iterable[Row], *fields: str) -> str:
    """Formats each row as a line: its naming fields, time and memory, or why it was skipped."""
    lines = []
    for row in rows:
        texts = [f"{row[field]!s:14}" for field in fields]
        seconds = row.get("median_seconds_per_step", row.get("median_seconds"))
        if seconds is not None:
            texts.append(f"{1e3 * seconds:12,.2f} ms")
        if "steps_per_second" in row:
            texts.append(f"{row['steps_per_second']:9.2f} steps/s")
        if "temporaries_bytes" in row:
            texts.append(f"{row['temporaries_bytes'] / 2**20:12,.1f} MiB of temporaries")
        lines.append(" ".join([*texts, row.get("skipped", "")]).rstrip())
    return "\n".join(lines)
