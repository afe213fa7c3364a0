"""Maps a function over arguments on all cores, and yields the results in order."""

import collections
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# Python's resource tracker cleans up after an interrupted program; its warnings would only confuse.
_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[..., T], arguments: Iterable[tuple], *, workers: int | None = None
) -> Iterator[T]:
    """Yields function(*argument) for each argument, in order, computed by processes a bit ahead.

    Args:
      function: importable by name; arguments and results must be picklable.
      arguments: tuples of arguments; they are read only a few calls ahead of the results taken.
      workers: number of processes; None means one for each core, 1 computes in this process.

    Raises:
      What function raises, when that result is taken.
    """
    workers = workers or num_cores()
    if workers == 1:
        yield from itertools.starmap(function, arguments)
        return
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)  # the tracker's process inherits it
    # Not forked: JAX's threads would not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        yield from in_order(pool, function, arguments, ahead=2 * workers)


def in_order(
    pool: Executor, function: Callable[..., T], arguments: Iterable[tuple], *, ahead: int
) -> Iterator[T]:
    """Yields function(*argument) for each argument, in order, computed by a pool.

    The pool is shut down at the end.

    Args:
      pool: threads or processes.
      function: as in ordered_map.
      arguments: as in ordered_map; they may be endless.
      ahead: number of calls that are computed beyond the one whose result is taken next.

    Raises:
      What function raises, when that result is taken.
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


def _start_worker() -> None:
    """Makes a worker ignore Ctrl-C, which its parent handles, and end if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
