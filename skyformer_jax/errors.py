"""The exception that is meant for the person at the keyboard, and what raises it everywhere."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend: one line, what was wrong, what is allowed, what to do.

    The command lines print its text without a traceback and exit with status 2.
    """


def missing_package(error: ModuleNotFoundError) -> str:
    """What to do about a package of the benchmark's that is not installed.

    Raises:
      ModuleNotFoundError: the error itself, if what is missing is a module of ours.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "skyformer_jax", "configs", "experiments"):
        raise error
    return (
        f"{package} is not installed, which the data and the training need: pip install "
        '"skyformer_jax[lra]", or in a checkout pip install -e ".[lra]"'
    )


@contextlib.contextmanager
def lra_imports() -> Iterator[None]:
    """For the imports of a command: ends it in one line if a package of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)


def one_of(what: str, got: str, allowed: Iterable[str]) -> str:
    """Returns got if it is allowed.

    Raises:
      UserError: otherwise, with what is allowed and the closest of it.
    """
    allowed = tuple(allowed)
    if got not in allowed:
        close = difflib.get_close_matches(str(got), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown {what} {got!r}{hint}; choose one of: {', '.join(allowed)}")
    return got


@contextlib.contextmanager
def full_disk(directory: str | Path) -> Iterator[None]:
    """Turns a failed write on a full disk, which libraries raise in many shapes, into one line.

    Args:
      directory: the folder that its block writes to.

    Raises:
      UserError: for an error of any kind whose text speaks of no space or quota left.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if any(word in text for word in ("No space left", "ENOSPC", "EDQUOT", "Quota exceeded")):
            raise UserError(
                f"the disk of {directory} is full; all that was finished is kept: free some space "
                "and start the same command to go on"
            ) from error
        raise
