"""Downloads files from the Hugging Face hub, resuming after interruptions and checking hashes."""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import file_download

from skyformer_jax.errors import UserError
from skyformer_jax.progress import say

# Chunk size of downloads, in bytes. A connection that breaks loses the chunk in progress. With the
# client's default of 10 MiB, a download over a bad network might never advance.
_AT_ONCE = 1 << 16
_OF_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
_SHA256 = re.compile("[0-9a-f]{64}")


class DataSet(NamedTuple):
    """A data set of the hub at one revision.

    Attributes:
      name: OWNER/NAME of the data set.
      revision: a commit, so that the files never change.
      folder: the folder of the data set that holds the files.
    """

    name: str
    revision: str
    folder: str


class _File(NamedTuple):
    """A file to download: its address and name, and the size and SHA-256 that it must have."""

    url: str
    name: str
    size: int
    sha256: str


def download(
    data_set: DataSet, names: Iterable[str], folder: Path, *, extra_bytes: int, instead: str
) -> None:
    """Downloads those files of a data set that a folder lacks.

    A file is renamed to its name only when it is complete and has the SHA-256 that the hub reports.
    Until then its bytes are in NAME.part, from whose end an interrupted download resumes. The
    environment variable HF_ENDPOINT may name another server with the same protocol, and HF_TOKEN
    may hold a token.

    Args:
      data_set: the data set to download from.
      names: names of the files.
      folder: where to put the files.
      extra_bytes: bytes that must stay free on the disk after the download.
      instead: what the user can do instead, for errors.

    Raises:
      UserError: if the server cannot be reached or refuses, the disk is too small, or a file
        arrives with another SHA-256.
    """
    missing = [name for name in names if not (folder / name).exists()]
    try:
        files = [_describe(data_set, name) for name in missing]
        folder.mkdir(parents=True, exist_ok=True)
        _check_disk(files, folder, extra_bytes, instead)
        for file in files:
            _download_file(file, folder)
    except UserError:
        raise
    except Exception as error:  # the client, its network library and the disk raise many types
        if isinstance(error, OSError) and error.errno and not isinstance(error, _OF_NETWORK):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the download of {data_set.name} from the Hugging Face hub failed: {reason}; what has "
            f"arrived is kept: start the same command to go on, or {instead}"
        ) from None


def _describe(data_set: DataSet, name: str) -> _File:
    """Returns address, size and SHA-256 of a file; the hub reports them for files in Git LFS."""
    url = huggingface_hub.hf_hub_url(
        data_set.name,
        f"{data_set.folder}/{name}",
        repo_type="dataset",
        revision=data_set.revision,
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    metadata = huggingface_hub.get_hf_file_metadata(url)
    if not metadata.size or not _SHA256.fullmatch(metadata.etag or ""):
        raise ValueError(f"{url} gives no size and SHA-256 of the file")
    return _File(url, name, metadata.size, metadata.etag)


def _part(file: _File, folder: Path) -> Path:
    return folder / f"{file.name}.part"


def _check_disk(files: Iterable[_File], folder: Path, extra_bytes: int, instead: str) -> None:
    """Prints how much will be downloaded; raises UserError unless it fits on the disk."""
    total = sum(file.size for file in files)
    parts = (_part(file, folder) for file in files)
    there = sum(part.stat().st_size for part in parts if part.exists())
    say(
        f"downloading {total / 1e9:.1f} GB into {folder}"
        + (f", of which {there / 1e9:.1f} GB are already there" if there else "")
    )
    needed, free = total - there + extra_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free; the download and what is made of "
            f"it need {needed / 1e9:.1f} GB: free some space, name another data_dir, or {instead}"
        )


def _download_file(file: _File, folder: Path) -> None:
    """Downloads the missing part of a file, and checks the whole file."""
    part = _part(file, folder)
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    with part.open("ab") as stream:
        say(f"downloading {file.name}, {file.size / 1e9:.2f} GB, from {file.url}")
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = _AT_ONCE
        # Not hf_hub_download, which since version 2 starts over after an interruption.
        file_download.http_get(
            file.url,
            stream,
            resume_size=stream.tell(),
            headers=huggingface_hub.utils.build_hf_headers(),
            expected_size=file.size,
        )
    with part.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != file.sha256:
        part.unlink()
        raise UserError(
            f"{file.name} arrived with SHA-256 {sha256[:12]}..., not {file.sha256[:12]}...; it was "
            "removed: start the same command to download it again"
        )
    part.replace(folder / file.name)
