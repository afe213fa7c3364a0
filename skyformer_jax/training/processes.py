"""Several processes of one run: how they start, agree and stop.

With one process every function here is trivial. With several, all must call the same functions in
the same order.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from skyformer_jax import progress
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say

# How JAX and its collectives (Gloo, NCCL) report that a process is gone.
_LOST = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "heartbeat timeout",
    "CoordinationServiceError",
)


class LostProcessError(UserError):
    """Another process of the run is gone, so no computation that needs it can finish."""


def start(coordinator: str, num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes; call it before anything else asks JAX for its devices.

    Args:
      coordinator: "" for a process by itself; "auto" takes what the environment says: JAX knows how
        to ask on TPU pods, under Slurm, Open MPI and Kubernetes, and reads the environment
        variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; otherwise host:port
        of process 0, which the others can reach.
      num_processes: the number of processes; 0 leaves it to the environment.
      process_id: the number of this one; -1 leaves it to the environment.

    Raises:
      UserError: if these do not fit together, or the environment says nothing.
    """
    if not coordinator or jax.distributed.is_initialized():
        return
    count = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    index = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes=count or None,
            process_id=index if index >= 0 else None,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"parallel.coordinator={coordinator}: {reason}; name host:port of process 0, "
            "parallel.num_processes and parallel.process_id (0 to num_processes - 1)"
        ) from None
    if not is_first():
        progress.mute()


def is_first() -> bool:
    """Whether this process writes files and prints for all."""
    return jax.process_index() == 0


def broadcast(value: int | None) -> int | None:
    """The first process's value, in every process."""
    if jax.process_count() == 1:
        return value
    number = multihost_utils.broadcast_one_to_all(np.int64(-1 if value is None else value))
    return None if number < 0 else int(number)


def all_gather(value: int) -> list[int]:
    """The values of all processes, in every process."""
    if jax.process_count() == 1:
        return [value]
    return np.asarray(multihost_utils.process_allgather(np.int64(value))).tolist()


@contextlib.contextmanager
def barrier() -> Iterator[None]:
    """Waits for all processes at the end of its block, and raises in all if one block raised.

    Raises:
      UserError: if another process failed; that process's own line says more.
    """
    try:
        yield
    except Exception:
        all_gather(1)
        raise
    failed = [i for i, bad in enumerate(all_gather(0)) if bad]
    if failed:
        raise UserError(f"process {failed[0]} stopped; what it printed says why")


@contextlib.contextmanager
def lost_process_errors() -> Iterator[None]:
    """Turns the failure of a computation into one line if it means the end of another process.

    JAX itself aborts a process, with lines of its own, once it knows that another one is gone: at
    once if that was process 0, otherwise after a hundred seconds.

    Raises:
      LostProcessError: then.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        if jax.process_count() == 1 or not any(words in reason for words in _LOST):
            raise
        raise LostProcessError(
            f"another process of this run ended; what it printed says why. Start all of them again "
            f"to go on. ({reason[:200]})"
        ) from error


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """A function (step) -> whether SIGTERM or SIGINT asks to stop; call it once after each step.

    A second signal acts as it would without this. Several processes agree on the step, some ten
    steps after the signal to one of them: this is JAX's protocol for preemption, whose notice is
    SIGTERM.
    """
    received: list[int] = []
    old: dict[int, Any] = {}
    several = jax.process_count() > 1

    def receive(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, old[number])
        say(f"{signal.Signals(number).name}: stopping after the current step")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX has taken over

    def should_stop(step: int) -> bool:
        if several:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(received)

    for caught in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
        old[int(caught)] = signal.signal(caught, receive)
    try:
        yield should_stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
