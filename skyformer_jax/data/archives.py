"""Finds and reads published data in an unpacked folder, or in the archive itself."""

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
_PACKED_RELEASES = ("lra_release.gz", "lra_release.tar.gz")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # the byte-order marks of UTF-16
_LFS = b"version https://git-lfs.github.com/spec/"
_COMPRESSED = {  # by the first bytes of the file
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_DAMAGE = (EOFError, OSError, tarfile.TarError, zlib.error, lzma.LZMAError)


class Kind(NamedTuple):
    """Describes a file that may not be the expected one, and what the user can do about it.

    Attributes:
      what: what the file is, a noun phrase.
      advice: what the user can do.
      folder: for a tar archive, the folder into which it unpacks.
    """

    what: str
    advice: str
    folder: str = ""


_POINTER = Kind("a pointer of Git LFS, in place of a file not fetched", "run git lfs pull")
_TABLE = Kind("a table", "name its folder, which must hold one for train and one for test")
_PICKLE = Kind("a pickle of Python", "name its folder")
_WEB_PAGE = Kind("a web page", "a server sent it in place of the file; download that again")
_BEGINNINGS = {
    b"PK\x03\x04": Kind("a zip archive", "unpack it, and name its folder"),
    b"PAR1": _TABLE,
    _LFS: _POINTER,
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
}
_RELEASE = Kind(
    "the packed release of the Long Range Arena",
    "unpack it (tar -xzf), and name the folder that this makes",
    "lra_release",
)
_ARCHIVES = (
    _RELEASE,
    Kind("the archive of IMDB's reviews", "name it for task text", "aclImdb"),
    *(
        Kind(f"the archive of CIFAR-10, {version}", "name it for task image", folder)
        for version, folder in (
            ("binary version", "cifar-10-batches-bin"),
            ("Python version", "cifar-10-batches-py"),
        )
    ),
    *(
        Kind("the archive of CIFAR-100", "name that of CIFAR-10", f"cifar-100-{version}")
        for version in ("binary", "python")
    ),
)


class NotHereError(UserError):
    """Raised when a source does not hold the expected published files."""


class Published(NamedTuple):
    """A form in which a data set is published.

    Attributes:
      folder: name of the folder into which the archive unpacks.
      contents: names of files or folders in it; a folder that has them all is taken for it.
      archives: file names that the archive may have.
      files: glob pattern of the files in the folder whose fingerprints are stored with a prepared
        data set, to notice a change of the source; "" if there are too many files.
    """

    folder: str
    contents: tuple[str, ...]
    archives: tuple[str, ...]
    files: str = ""


def find(source: Path, forms: Sequence[Published]) -> Path | None:
    """Finds published data: the first of the forms' folders, or else the first of their archives.

    Args:
      source: the folder or the archive itself, under any name; or a folder that holds either. The
        unpacked folder may also lie in cifar/, as in S4's layout.
      forms: the forms to look for.

    Returns:
      A folder that has the contents, or an archive; None if there is neither.
    """
    if source.is_file():
        kind = kind_of(source)
        return source if kind is None or kind.folder in [form.folder for form in forms] else None
    for form in forms:
        for folder in (source, source / form.folder, source / "cifar" / form.folder):
            if _has(folder, form.contents):
                return folder
    names = (name for form in forms for name in form.archives)
    return next(filter(Path.is_file, (source / name for name in names)), None)


def locate(source: Path, forms: Sequence[Published]) -> Path:
    """Finds the published folder or archive, as find does.

    Raises:
      NotHereError: if there is neither. The message says what was found, and what to put there.
    """
    place = find(source, forms)
    if place is not None:
        return place
    if source.is_file():
        kind = kind_of(source)
        wanted = " or ".join(form.folder for form in forms)
        raise NotHereError(f"{source} is {kind.what}, not an archive of {wanted}: {kind.advice}")
    wanted = ", nor ".join(
        f"{' and '.join(form.contents)}, nor {form.folder}/ with them, nor "
        f"{' or '.join(form.archives)}"
        for form in forms
    )
    raise NotHereError(
        f"{source} does not hold {wanted}; {holding(source)}name the unpacked folder or the "
        "archive, or put either there"
    )


def holding(source: Path) -> str:
    """Returns a clause for an error: what a folder holds, or that it is missing; "" if empty."""
    if not source.exists():
        return "it does not exist; "
    names = sorted(os.listdir(source)) if source.is_dir() else []
    if not names:
        return ""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}; "


def kind_of(path: Path) -> Kind | None:
    """Identifies a file by its beginning or suffix; None if unknown, as for a damaged archive."""
    with path.open("rb") as file:
        start = file.read(512)
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if _is_web_page(start):
        return _WEB_PAGE
    if path.suffix in (".csv", ".tsv"):
        return _TABLE
    try:
        with tarfile.open(path, "r:*") as tar:
            first = tar.next()
    except _DAMAGE:
        return None
    folders = Path(first.name).parts if first else ()
    return next((kind for kind in _ARCHIVES if kind.folder in folders), None)


def _is_web_page(start: bytes) -> bool:
    return start.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def check_readable(path: Path) -> None:
    """Checks that a file is not of one of the wrong kinds that are often found in its place.

    Raises:
      UserError: if it is a Git LFS pointer, a web page, a compressed file, or UTF-16 text.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_UTF16):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
    if start.startswith(_LFS):
        raise UserError(f"{path} is {_POINTER.what}: {_POINTER.advice}")
    if _is_web_page(start):
        raise UserError(f"{path} is {_WEB_PAGE.what}: {_WEB_PAGE.advice}")
    for beginning, name in _COMPRESSED.items():
        if start.startswith(beginning) and path.suffix != ".npz":  # itself a zip archive
            raise UserError(f"{path} is compressed ({name}); unpack it")


def members(
    place: Path, pattern: re.Pattern[str], what: str
) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yields the wanted files of a data set, in no particular order. Reads an archive only once.

    Args:
      place: the published folder or archive, as find returns it.
      pattern: pattern of the wanted files' paths, with "/" between folders. It must match the end
        of a path, starting at the beginning of a folder's or file's name.
      what: what the files are, for errors.

    Yields:
      The match of each path, and the content of that file.

    Raises:
      UserError: if an archive is damaged or partly downloaded, or holds no such files; or if a
        wanted file of a folder is a broken link.
    """
    whole = re.compile(f"(?:.*/)?{pattern.pattern}")
    if place.is_dir():
        yield from _files_of_folder(place, whole)
        return
    found = False
    for member in _files_of_archive(place, whole):
        found = True
        yield member
    if not found:
        raise UserError(f"{place} is incomplete, or another archive: it holds none of {what}")


def _files_of_folder(
    place: Path, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], bytes]]:

    def fail(error: OSError) -> None:
        raise error  # by default, os.walk skips folders that it cannot read

    for parent, _, names in os.walk(place, onerror=fail):
        below = Path(parent).relative_to(place)
        for name in names:
            if match := pattern.fullmatch((below / name).as_posix()):
                try:
                    yield match, (place / below / name).read_bytes()
                except FileNotFoundError:
                    raise UserError(
                        f"{place / below / name} is a link to a file that is not there"
                    ) from None


def _files_of_archive(
    place: Path, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], bytes]]:
    try:
        with tarfile.open(place, "r:*") as tar:
            for member in tar:
                if member.isfile() and (match := pattern.fullmatch(member.name)):
                    yield match, tar.extractfile(member).read()
            # Read on to the end, because the archive's checksum comes after the last file.
            while tar.fileobj.read(1 << 20):
                pass
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno:  # a failure of the machine
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place} is damaged or partly downloaded ({reason}); download it again"
        ) from None


def fingerprint(path: Path) -> list[int | str]:
    """Returns the size of a file, and a hash of its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        ends += file.read()
    return [size, f"{splits.content_hash(ends):016x}"]


def check_count(place: Path, count: int, expected: int, what: str) -> None:
    """Checks that a data set has the expected number of items.

    Args:
      place: the folder or archive, for errors.
      count: number of items found.
      expected: number of items as published.
      what: what the items are, such as "images in train", for errors.

    Raises:
      UserError: if count is not the expected number.
    """
    if count < expected:
        raise UserError(
            f"{place} is incomplete: {count:,} of {expected:,} {what}; unpack or download it again"
        )
    if count > expected:
        raise UserError(
            f"{place} is not as published: {count:,} of {expected:,} {what}; name the published one"
        )


def find_in_release(source: Path, folders: Sequence[str], contents: Sequence[str]) -> Path:
    """Finds a folder of the official release of the Long Range Arena.

    The release holds some folders twice, the second one level deeper, and with different files.

    Args:
      source: the folder itself, or one that holds it, or one that holds lra_release/.
      folders: names that the folder may have: the release's, then those used by others.
      contents: names of files or folders that the folder must hold.

    Raises:
      NotHereError: if there is no such folder. The message says what is missing.
      UserError: if there are several, which the message names; or if the release is still packed.
    """
    if _has(source, contents):
        return source
    places = (source / release / folder for release in _RELEASE_FOLDERS for folder in folders)
    copies = {place.resolve(): place for place in places if _has(place, contents)}
    if len(copies) > 1:
        raise UserError(
            f"{source} holds {len(copies)} copies of {folders[0]}, which may differ: "
            f"{' and '.join(map(str, copies.values()))}; name the one to read as the source"
        )
    for place in copies.values():
        return place
    _check_unpacked(source)
    raise NotHereError(
        f"{source} does not hold {', '.join(contents)}, nor does {folders[0]}/ in it; "
        f"{holding(source)}name the folder of the unpacked lra_release"
    )


def _check_unpacked(source: Path) -> None:
    """Raises a UserError with advice if source is a file, or holds the release still packed."""
    if source.is_file():
        kind = kind_of(source) or Kind("a file", "name the folder of lra_release")
        error = UserError if kind is _RELEASE else NotHereError
        raise error(f"{source} is {kind.what}, but a folder is needed: {kind.advice}")
    packed = next(filter(Path.is_file, (source / name for name in _PACKED_RELEASES)), None)
    if packed is not None and not (source / "lra_release").exists():
        raise UserError(f"{packed} is {_RELEASE.what}: {_RELEASE.advice}")


def find_files(source: Path, folders: Sequence[str], names: Mapping[str, str]) -> dict[str, Path]:
    """Finds files in a folder of the release, as find_in_release does.

    Args:
      source: as in find_in_release.
      folders: as in find_in_release.
      names: for each split, the name of its file.

    Returns:
      The path of the file of each split.

    Raises:
      UserError: as find_in_release and check_readable do.
    """
    found = find_in_release(source, folders, list(names.values()))
    paths = {split: found / name for split, name in names.items()}
    for path in paths.values():
        check_readable(path)
    return paths


def is_utf8(text: bytes) -> bool:
    """Returns True if the bytes are valid UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has(folder: Path, contents: Sequence[str]) -> bool:
    """Returns True if the folder has all of the contents."""
    return all((folder / name).exists() for name in contents)
