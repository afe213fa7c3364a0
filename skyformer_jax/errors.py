"""UserError, the exception for faults that the user can fix, and helpers that raise it."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix; one line says what was wrong, what is allowed, what to do.

    The command lines print the message without a traceback and exit with status 2.
    """


def missing_package(error: ModuleNotFoundError) -> str:
    """Returns a message about a package of the lra extra that is not installed.

    Raises:
      ModuleNotFoundError: the error itself, if the missing module is one of this repository's.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "skyformer_jax", "configs", "experiments"):
        raise error
    return (
        f"{package} is not installed, but the data sets and training need it: pip install "
        '"skyformer_jax[lra]", or in a clone pip install -e ".[lra]"'
    )


@contextlib.contextmanager
def lra_imports() -> Iterator[None]:
    """Wraps a command's imports: exits with one line if a package of the lra extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)


def one_of(what: str, got: str, allowed: Iterable[str]) -> str:
    """Returns got if it is allowed.

    Raises:
      UserError: if it is not. The message lists the allowed values and suggests the closest one.
    """
    allowed = tuple(allowed)
    if got not in allowed:
        close = difflib.get_close_matches(str(got), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown {what} {got!r}{hint}; choose one of: {', '.join(allowed)}")
    return got


@contextlib.contextmanager
def full_disk(directory: str | Path) -> Iterator[None]:
    """Turns a write that fails on a full disk, whatever a library raises for it, into a UserError.

    Args:
      directory: the folder that the block writes to.

    Raises:
      UserError: for an error of any type whose text says that no space or quota is left.
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
