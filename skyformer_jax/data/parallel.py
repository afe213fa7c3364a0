"""Work for all cores: a function mapped by processes, its results in order."""

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
# Python's own helper process clears up what an interrupted program left, and need not say so.
_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[..., T], arguments: Iterable[tuple], *, workers: int | None = None
) -> Iterator[T]:
    """Yields function(*argument) for each argument, in order, computed a bit ahead.

    Args:
      function: importable by name, as its arguments and results must be picklable.
      arguments: read no further than a few calls ahead of the results taken.
      workers: processes; None means one for each core, 1 computes in this process.

    Raises:
      What function raises, at its place in the order.
    """
    workers = workers or num_cores()
    if workers == 1:
        yield from itertools.starmap(function, arguments)
        return
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)  # handed on to that process
    # Not forked: JAX's threads would not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        yield from in_order(pool, function, arguments, ahead=2 * workers)


def in_order(
    pool: Executor, function: Callable[..., T], arguments: Iterable[tuple], *, ahead: int
) -> Iterator[T]:
    """Yields function(*argument) for each argument, in order, by a pool that this uses up.

    Args:
      pool: of threads or processes.
      function: as ordered_map.
      arguments: as ordered_map; there may be no end of them.
      ahead: calls beyond the one whose result is taken next.

    Raises:
      What function raises, at its place in the order.
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
    """Leaves Ctrl-C to the parent, and ends with it, should it be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
