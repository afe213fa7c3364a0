"""Starts, coordinates and stops the processes of a multi-process run.

In a single-process run these functions return at once. Otherwise all processes must call the same
functions in the same order.
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

# Parts of the messages by which JAX and its collectives (Gloo, NCCL) report a lost process.
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
    """Another process of the run ended, so no computation that needs it can finish."""


def start(coordinator: str, num_processes: int = 0, process_id: int = -1) -> None:
    """Connects to the other processes; call it before anything queries JAX's devices.

    Args:
      coordinator: "" for a single-process run; "auto" to detect the coordinator; otherwise the
        host:port of process 0, which the others can reach. Detection works on TPU pods, under
        Slurm, Open MPI and Kubernetes, and by the environment variables JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      num_processes: the number of processes; 0 reads it from the environment.
      process_id: the index of this process; -1 reads it from the environment.

    Raises:
      UserError: if the arguments do not fit together, or detection fails.
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
    """Returns True on the process that writes files and prints."""
    return jax.process_index() == 0


def broadcast(value: int | None) -> int | None:
    """Returns the first process's value on every process."""
    if jax.process_count() == 1:
        return value
    number = multihost_utils.broadcast_one_to_all(np.int64(-1 if value is None else value))
    return None if number < 0 else int(number)


def all_gather(value: int) -> list[int]:
    """Returns the values of all processes, in process order, on every process."""
    if jax.process_count() == 1:
        return [value]
    return np.asarray(multihost_utils.process_allgather(np.int64(value))).tolist()


@contextlib.contextmanager
def barrier() -> Iterator[None]:
    """Waits for all processes at the end of the block; if one raised, raises in all of them.

    Raises:
      UserError: if another process failed; the output of that process says why.
    """
    try:
        yield
    except Exception:
        all_gather(1)
        raise
    failed = [i for i, bad in enumerate(all_gather(0)) if bad]
    if failed:
        raise UserError(f"process {failed[0]} failed; its output says why")


@contextlib.contextmanager
def lost_process_errors() -> Iterator[None]:
    """Turns the error that a lost process causes in the block into an error of one line.

    JAX itself aborts a process, with its own messages, once it detects that another one ended: at
    once if that was process 0, otherwise after a hundred seconds.

    Raises:
      LostProcessError: if a computation failed because another process ended.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        if jax.process_count() == 1 or not any(words in reason for words in _LOST):
            raise
        raise LostProcessError(
            f"another process of this run ended; its output says why. Start all processes again "
            f"to go on. ({reason[:200]})"
        ) from error


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that returns True once SIGTERM or SIGINT was received.

    Call that function once after each step. A second signal has its usual effect. Several processes
    agree on the step at which all of them stop, about ten steps after one of them was signalled:
    they use JAX's preemption protocol, whose notice is SIGTERM.
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
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles this signal

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
