"""The JSON file of a result: what it was measured with, how it is written, how it goes on.

Every script of experiments/ that can be interrupted goes on in the same way:

    header = {"what": "...", **provenance(jax.device_count()), "seed": 0}
    rows = resume(path, header)
    for name in names:
        if any(row["name"] == name for row in rows):
            continue
        rows += measure(name)
        write_json(path, {**header, "rows": rows})
"""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib

from skyformer_jax.errors import UserError
from skyformer_jax.progress import say

Row = dict[str, Any]


def provenance(num_devices: int) -> dict[str, Any]:
    """The fields of a result that say what code and hardware it comes from.

    Args:
      num_devices: devices that took part.

    Returns:
      commit, versions, device and cores.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    # A new result changes a tracked file, but not the code that measures.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"
    )
    return {
        "commit": (git("describe", "--always") or "unknown") + ("-dirty" if changed else ""),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "device": f"{num_devices} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
    }


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` at the end: the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all; makes its folder."""
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: if it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of the JSON or of its encoding
        raise UserError(f"{path} is damaged: {error}") from None


def as_read(value: Any) -> Any:
    """The value as a JSON file gives it back: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def resume(
    path: Path, header: Mapping[str, Any], *, field: str = "rows", any_commit: bool = False
) -> list[Row]:
    """The rows of an earlier result of the same settings; else none, and one line says why.

    Args:
      path: of the JSON file. If it is not there, there are no rows and nothing is said.
      header: of the result that is to be written now. The earlier one must have the same value in
        each of these fields. Further fields of the earlier result do not matter.
      field: name of the list of rows in the file.
      any_commit: whether the rows may be of other code, because each says its own commit. If not,
        neither another commit nor uncommitted changes are accepted.
    """
    if not path.exists():
        return []
    try:
        earlier = read_json(path)
        rows, found = earlier[field], {name: earlier.get(name) for name in header}
    except (UserError, KeyError, TypeError, AttributeError):
        say(f"{path} is no result of this script: begun anew")
        return []
    wanted = as_read(header)
    different = [
        name
        for name, value in wanted.items()
        if found[name] != value and not (any_commit and name == "commit")
    ]
    if different:
        say(f"{path} is of other {', '.join(different)}: begun anew")
        return []
    if not any_commit and str(wanted.get("commit")).endswith("-dirty"):
        say(f"{path} is of uncommitted changes, maybe not of those of now: begun anew")
        return []
    return rows
