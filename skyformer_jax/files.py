"""Paths, locks and owners of files, also on systems without home folders, locks or user names."""

import contextlib
import fcntl
import grp
import pwd
from collections.abc import Iterator
from pathlib import Path

from skyformer_jax.errors import UserError
from skyformer_jax.progress import say


def expand(path: str | Path) -> Path:
    """Returns the path with a leading ~ or ~user replaced by that home folder.

    Raises:
      UserError: if the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path} begins with a home folder that is not known here; write the whole path, or "
            "set the environment variable HOME"
        ) from None


def check_name(path: Path) -> None:
    """Checks that a path is valid text, because the libraries that store arrays open no other.

    Python accepts a name whose bytes are not valid in the encoding of the locale, but the path is
    then no valid Unicode.

    Raises:
      UserError: for such a path.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{str(path)!a} is not text in the encoding of this locale; name another folder, or "
            "set LC_ALL=C.UTF-8"
        ) from None


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a file lock while its block runs.

    Some file systems of clusters and containers have no locks. There, a line says so, and the block
    runs without a lock.

    Args:
      path: the lock file, created if it is missing.
      wait: whether to wait while another process holds the lock.

    Yields:
      True if the lock is held, False if the file system has no locks.

    Raises:
      BlockingIOError: if another process holds the lock and wait is False.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise
        except OSError as error:
            held = False
            say(
                f"{path.parent} is on a file system without locks ({error.strerror}): nothing "
                "keeps a second process out of it"
            )
        yield held


@contextlib.contextmanager
def unnamed_owners() -> Iterator[None]:
    """Lets users and groups without a name go by their number while its block runs.

    TFDS looks up the owner of every file that it writes through etils, which raises KeyError for a
    user without an entry in passwd (google/etils, issue 790). Containers often run as such a user.
    """
    users, groups = pwd.getpwuid, grp.getgrgid

    def user(uid: int) -> pwd.struct_passwd:
        try:
            return users(uid)
        except KeyError:
            return pwd.struct_passwd((str(uid), "x", uid, uid, "", "/", ""))

    def group(id: int) -> grp.struct_group:  # the parameter's name in Python
        try:
            return groups(id)
        except KeyError:
            return grp.struct_group((str(id), "x", id, []))

    pwd.getpwuid, grp.getgrgid = user, group
    try:
        yield
    finally:
        pwd.getpwuid, grp.getgrgid = users, groups
