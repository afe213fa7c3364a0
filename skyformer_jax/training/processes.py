"""Several processes with one run between them: how they start, agree and stop.

Everything here is a matter of course where there is only one process. Where there are several, all
must call the same functions in the same order.
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

# How JAX and its collectives (Gloo, NCCL) speak of a process that is gone.
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
    """Another process of the run is gone; nothing that needs it can be done."""


def start(coordinator: str, num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes; to be called before anything else asks JAX for its devices.

    Args:
      coordinator: "" for a process by itself; "auto" takes what the environment says, which JAX
        knows how to ask on TPU pods, under Slurm, Open MPI and Kubernetes, or the environment
        variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; else host:port
        of process 0, which the others can reach.
      num_processes: how many there are; 0 leaves it to the environment.
      process_id: which one this is; -1 leaves it to the environment.

    Raises:
      UserError: if this does not add up, or the environment says nothing.
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
    """Whether this process writes for all."""
    return jax.process_index() == 0


def of_first(value: int | None) -> int | None:
    """What the first process has, on all."""
    if jax.process_count() == 1:
        return value
    number = multihost_utils.broadcast_one_to_all(np.int64(-1 if value is None else value))
    return None if number < 0 else int(number)


def of_all(value: int) -> list[int]:
    """What each process has, on all."""
    if jax.process_count() == 1:
        return [value]
    return np.asarray(multihost_utils.process_allgather(np.int64(value))).tolist()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Waits for all processes at the end of its block, and raises in all if one of them did.

    Raises:
      UserError: for what failed in another process, whose own line says more.
    """
    try:
        yield
    except Exception:
        of_all(1)
        raise
    failed = [i for i, bad in enumerate(of_all(0)) if bad]
    if failed:
        raise UserError(f"process {failed[0]} stopped; what it printed says why")


@contextlib.contextmanager
def others_needed() -> Iterator[None]:
    """Says in one line what a computation's failure means if it is another process's end.

    JAX itself aborts a process, with lines of its own, once it knows that another one is gone: at
    once if that was process 0, else after a hundred seconds.

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
def stop_signals() -> Iterator[Callable[[int, int], bool]]:
    """A question, to be asked once after each step, whether SIGTERM or SIGINT asks to stop.

    It takes the numbers of the last step asked about and of this one. A second signal acts as it
    would without us. Several processes agree on the step, some ten steps after the notice that one
    of them got: this is JAX's protocol of preemptions, whose notice is SIGTERM.
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

    def asked(before: int, step: int) -> bool:
        if several:
            return any(
                [
                    multihost_utils.reached_preemption_sync_point(s)
                    for s in range(before + 1, step + 1)
                ]
            )
        return bool(received)

    for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, receive)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
