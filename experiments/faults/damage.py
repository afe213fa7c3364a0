"""Damages files of a checkpoint, single bits, disks and write permissions, for the soak."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


class NotTriedError(Exception):
    """Raised if this machine does not allow the fault."""


def truncate(checkpoint: Path, rng: random.Random, index: int) -> str:
    """Cuts all files of the state in half, or one file anywhere; returns a description."""
    if index == 0:
        for path in (path for path in (checkpoint / "state").rglob("*") if path.is_file()):
            os.truncate(path, path.stat().st_size // 2)
        return "all of state/"
    path = rng.choice(_files(checkpoint))
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{_kind(checkpoint, path)} to {size} bytes"


def empty(checkpoint: Path, rng: random.Random, index: int) -> str:
    """Deletes everything in a checkpoint, or the content of its files; returns a description."""
    del rng
    if index == 0:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        return "the folder"
    for path in _files(checkpoint):
        os.truncate(path, 0)
    return "all files"


def flip(checkpoint: Path, rng: random.Random, index: int) -> str:
    """Flips one to eight bits of a file, whose kind index selects; returns a description."""
    files = _files(checkpoint)
    kinds = sorted({_kind(checkpoint, path) for path in files})
    kind = kinds[index % len(kinds)]
    path = rng.choice([path for path in files if _kind(checkpoint, path) == kind])
    content = bytearray(path.read_bytes())
    positions = rng.sample(range(len(content)), min(len(content), rng.choice((1, 1, 2, 8))))
    for position in positions:
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{len(positions)} bit(s) of {kind}"


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)


def _kind(checkpoint: Path, path: Path) -> str:
    """Path of the file within the checkpoint, or of its folder where file names are random."""
    return str((path.parent if path.parent.name == "d" else path).relative_to(checkpoint))


def fill(folder: Path, spare: int) -> None:
    """Fills the disk of a folder with one file, except for `spare` bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    # The last write fell short by at most a page.
    os.truncate(filler, max(filler.stat().st_size - spare, 0))


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mounts a disk of that size at the folder while the block runs."""
    administer("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder)
    try:
        yield
    finally:
        administer("umount", folder)


def remount(folder: Path, options: str) -> None:
    """Changes the mount options of the small disk at the folder."""
    administer("mount", "-o", f"remount,{options}", folder)


def administer(*words: str | Path) -> None:
    """Runs a command.

    Raises:
      NotTriedError: if the command is missing or fails, for example without the right to use it.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotTriedError(f"no {words[0]} here") from None
    if done.returncode:
        raise NotTriedError(f"{words[0]}: {' '.join(done.stderr.split())}")
