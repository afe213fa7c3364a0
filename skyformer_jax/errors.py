"""The one exception that is meant for the person at the keyboard."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend: one line, what was wrong, what is allowed, what to do.

    The command lines print its text without a traceback and exit with status 2.
    """


@contextlib.contextmanager
def full_disk(directory: str | Path) -> Iterator[None]:
    """Turns a write that failed on a full disk, which libraries raise in many shapes, into a line.

    Args:
      directory: that its block writes to.

    Raises:
      UserError: for an error of any kind that speaks of no space or quota left.
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
