"""The progress of long work: a bar on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 20


_muted = False


def mute() -> None:
    """Silences this module, for all but the first of several processes."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one.

    A line that cannot be written, such as to a pipe whose reader has ended, is dropped: it must not
    end a run.
    """
    if _muted or sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        tqdm.tqdm.write(text, file=sys.stderr)


def open_bar(total: int, **options: Any) -> tqdm.tqdm | None:
    """Opens a tqdm bar with further options of tqdm; returns None unless on a terminal."""
    if _muted or sys.stderr is None or sys.stderr.closed or not sys.stderr.isatty():
        return None
    return tqdm.tqdm(total=total, dynamic_ncols=True, file=sys.stderr, **options)


class Progress:
    """Shows progress towards a total, with the rate and the time left."""

    def __init__(self, total: int, what: str, unit: str = "examples") -> None:
        """Starts at 0 of total; what names the work, and unit what is counted."""
        self._total, self._what, self._unit = total, what, unit
        self._count, self._start = 0, time.monotonic()
        self._said = self._start
        self._bar = open_bar(total, desc=what, unit=f" {unit}", unit_scale=True)

    def update(self, count: int) -> None:
        """Adds count to the progress; closes the bar when the total is reached."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
            if self._count >= self._total:
                self.close()
            return
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            rate = self._count / (now - self._start)
            left = tqdm.tqdm.format_interval((self._total - self._count) / max(rate, 1e-9))
            say(
                f"{self._what}: {self._count:,} of {self._total:,} {self._unit}, "
                f"{rate:,.0f} a second, ETA {left}"
            )

    def close(self) -> None:
        """Closes the bar, even before the total is reached."""
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[T], total: int, what: str, unit: str = "examples") -> Iterator[T]:
    """Yields the items and shows how many of the total have passed."""
    progress = Progress(total, what, unit)
    try:
        for item in items:
            yield item
            progress.update(1)
    finally:
        progress.close()
