"""Reads published data from where the user has it: an unpacked folder, or the archive itself."""

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from skyformer_jax.data import splits
from skyformer_jax.errors import UserError

# The official release of the Long Range Arena unpacks into lra_release/lra_release.
_RELEASE_FOLDERS = ("", "lra_release", "lra_release/lra_release")


class NotHereError(UserError):
    """A source does not hold the published files that are looked for."""


class Published(NamedTuple):
    """How a data set is published.

    Attributes:
      folder: name of the folder into which the archive unpacks.
      contents: names in that folder by which it is recognised.
      archives: names of the archive.
    """

    folder: str
    contents: tuple[str, ...]
    archives: tuple[str, ...]


def find(source: Path, published: Published) -> Path | None:
    """Finds the published folder or archive.

    Args:
      source: the folder or the archive itself, of any name; or a folder that holds either.
      published: what to look for.

    Returns:
      A folder that has the contents, or a file; None if there is neither.
    """
    if source.is_file():
        return source
    for folder in (source, source / published.folder):
        if _has(folder, published.contents):
            return folder
    return next(filter(Path.is_file, (source / name for name in published.archives)), None)


def locate(source: Path, published: Published) -> Path:
    """Finds the published folder or archive, as find does.

    Raises:
      NotHereError: if there is neither, saying what to put where.
    """
    place = find(source, published)
    if place is None:
        raise NotHereError(
            f"{source} does not hold {' and '.join(published.contents)}, nor {published.folder}/ "
            f"with them, nor {' or '.join(published.archives)}; name the unpacked folder or the "
            "archive, or put either there"
        )
    return place


def members(
    place: Path, published: Published, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yields some files of a data set, in no particular order; an archive is read once.

    Args:
      place: the published folder or archive, as found.
      published: what it is.
      pattern: matches the whole names of the wanted files, relative to the published folder, with
        "/" between folders.

    Yields:
      The match of each name, and the content of that file.

    Raises:
      UserError: if the archive is damaged or partly downloaded.
    """
    if place.is_dir():
        yield from _files_of_folder(place, pattern)
    else:
        yield from _files_of_archive(place, published.folder, pattern)


def _files_of_folder(
    place: Path, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], bytes]]:
    for parent, _, names in os.walk(place):
        below = Path(parent).relative_to(place)
        for name in names:
            if match := pattern.fullmatch((below / name).as_posix()):
                yield match, (place / below / name).read_bytes()


def _files_of_archive(
    place: Path, folder: str, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], bytes]]:
    try:
        with tarfile.open(place, "r:*") as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix(f"{folder}/")
                if member.isfile() and (match := pattern.fullmatch(name)):
                    yield match, tar.extractfile(member).read()
            # To the end, because the archive's checksum comes after the last file.
            while tar.fileobj.read(1 << 20):
                pass
    except (EOFError, OSError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:  # a fault of the machine
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place} is damaged or partly downloaded ({reason}); download it again"
        ) from None


def fingerprint(path: Path) -> list[int | str]:
    """Size of a file, and a hash of its first and its last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        ends += file.read()
    return [size, f"{splits.content_hash(ends):016x}"]


def check_count(place: Path, count: int, expected: int, what: str) -> None:
    """Checks that a data set is complete.

    Raises:
      UserError: unless the count of what is in place is the expected one.
    """
    if count != expected:
        raise UserError(
            f"{place} is {'incomplete' if count < expected else 'not as published'}: {count:,} of "
            f"{expected:,} {what}; unpack or download it again"
        )


def find_in_release(source: Path, folder: str, contents: Sequence[str]) -> Path:
    """Finds a folder of the official release of the Long Range Arena.

    The release holds some folders twice, the second one folder deeper, and not with the same files.

    Args:
      source: the folder itself, or one that holds it, or one that holds lra_release/.
      folder: name of the folder.
      contents: names that the folder must hold.

    Raises:
      NotHereError: if there is no such folder, saying what is missing.
      UserError: if there are several, naming them.
    """
    if _has(source, contents):
        return source
    places = (source / release / folder for release in _RELEASE_FOLDERS)
    copies = {place.resolve(): place for place in places if _has(place, contents)}
    if len(copies) > 1:
        raise UserError(
            f"{source} holds {len(copies)} copies of {folder}, which may differ: "
            f"{' and '.join(map(str, copies.values()))}; name the one to read as the source"
        )
    for place in copies.values():
        return place
    raise NotHereError(
        f"{source} does not hold {', '.join(contents)}, nor does {folder}/ in it; "
        "name the folder of the unpacked lra_release"
    )


def find_files(source: Path, folder: str, names: Mapping[str, str]) -> dict[str, Path]:
    """Finds files in a folder of the release, as find_in_release does.

    Args:
      source: as in find_in_release.
      folder: as in find_in_release.
      names: name of the file of each split.

    Returns:
      The path of the file of each split.

    Raises:
      UserError: as find_in_release.
    """
    found = find_in_release(source, folder, list(names.values()))
    return {split: found / name for split, name in names.items()}


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are valid UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has(folder: Path, contents: Sequence[str]) -> bool:
    """Whether the folder has all of the contents."""
    return all((folder / name).exists() for name in contents)
