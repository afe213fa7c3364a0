"""Maps a function over arguments on all cores, and yields the results in order."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

from skyformer_jax.errors import UserError

T = TypeVar("T")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[..., T], arguments: Iterable[tuple], *, workers: int | None = None
) -> Iterator[T]:
    """Yields function(*argument) for each argument, in order, while processes compute ahead.

    The processes run skyformer_jax.data.worker. They are not forked, because JAX's threads would
    not survive that. Unlike those of multiprocessing, they do not import the calling program, so it
    needs no `if __name__ == "__main__"`.

    Args:
      function: a function of an importable module, not of the program itself; arguments and
        results must be picklable.
      arguments: tuples of arguments, which are read only a few calls ahead of the results taken.
      workers: number of processes; None means one for each core, 1 computes in this process.

    Raises:
      Exception: whatever function raises, when that result is taken.
      UserError: if a worker is killed.
    """
    workers = workers or num_cores()
    arguments = iter(arguments)
    first = list(itertools.islice(arguments, workers))
    arguments = itertools.chain(first, arguments)
    if len(first) < 2 or not sys.executable:
        yield from itertools.starmap(function, arguments)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for _ in first:
            idle.put(stack.enter_context(_open_worker()))

        def call(*argument: object) -> T:
            worker = idle.get()
            try:
                return _ask(worker, function, argument)
            finally:
                idle.put(worker)

        yield from in_order(ThreadPoolExecutor(len(first)), call, arguments, ahead=2 * len(first))


@contextlib.contextmanager
def _open_worker() -> Iterator[Connection]:
    """Yields a connection to a new worker, which ends with the block or when this process ends."""
    # Ours is not closed here, because a thread may be reading; the last reference closes it.
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(
            # It imports from the same paths as this process: -P leaves out its working directory.
            [sys.executable, "-P", "-m", "skyformer_jax.data.worker", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output belongs to the caller
            process_group=0,  # Ctrl-C is for this process, which then ends its workers
        )
    try:
        yield ours
    finally:
        process.kill()
        process.wait()


def _ask(worker: Connection, function: Callable[..., T], arguments: tuple) -> T:
    """Returns the result of a call in a worker; raises what the call raised."""
    call = pickle.dumps((function, arguments))
    try:
        worker.send_bytes(call)
        good, result = worker.recv()
    except (EOFError, OSError):
        raise UserError(
            "a worker process was killed, perhaps because memory ran out; start the same command "
            "to go on"
        ) from None
    if not good:
        raise result
    return result


def in_order(
    pool: Executor, function: Callable[..., T], arguments: Iterable[tuple], *, ahead: int
) -> Iterator[T]:
    """Yields function(*argument) for each argument, in order, computed by a pool.

    The pool is shut down at the end.

    Args:
      pool: threads or processes.
      function: as in ordered_map.
      arguments: as in ordered_map; they may be endless.
      ahead: number of calls that are submitted beyond the one whose result is taken next.

    Raises:
      Exception: whatever function raises, when that result is taken.
    """
    calls: collections.deque[Future] = collections.deque()
    try:
        for argument in arguments:
            calls.append(pool.submit(function, *argument))
            if len(calls) > ahead:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
