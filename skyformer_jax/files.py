"""Paths, locks and owners of files, on systems that lack a home folder, locks or names of users."""

import contextlib
import fcntl
import grp
import pwd
from collections.abc import Iterator
from pathlib import Path

from skyformer_jax.errors import UserError
from skyformer_jax.progress import say


def expand(path: str | Path) -> Path:
    """The path with a leading ~ or ~user replaced by that home folder.

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
    """Raises a UserError for a path that is no text, which the storage of arrays cannot open.

    Python reads the bytes of such a name as it can: of another encoding than that of the locale.
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
    """Holds a lock while its block runs, and yields whether it does.

    Some file systems of clusters and containers have no locks. A line then says so, and the block
    runs without one.

    Args:
      path: the file of the lock, made if it is missing.
      wait: whether to wait while another process holds it.

    Raises:
      BlockingIOError: if another process holds it and wait is False.
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
    """Gives users and groups that have no name their number for one while its block runs.

    TFDS asks for the owner of every file that it writes, through a stat of etils which raises
    KeyError for a user without an entry in passwd (google/etils, issue 790). Containers often run
    as such a user.
    """
    users, groups = pwd.getpwuid, grp.getgrgid

    def user(uid: int) -> pwd.struct_passwd:
        try:
            return users(uid)
        except KeyError:
            return pwd.struct_passwd((str(uid), "x", uid, uid, "", "/", ""))

    def group(id: int) -> grp.struct_group:  # named as Python's
        try:
            return groups(id)
        except KeyError:
            return grp.struct_group((str(id), "x", id, []))

    pwd.getpwuid, grp.getgrgid = user, group
    try:
        yield
    finally:
        pwd.getpwuid, grp.getgrgid = users, groups
