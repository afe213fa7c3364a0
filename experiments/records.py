"""Reads, writes and resumes the JSON files of results, and records their provenance.

Every script of experiments/ that can be interrupted resumes in the same way:

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
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib

from skyformer_jax.data.parallel import num_cores
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say

Row = dict[str, Any]


def provenance(num_devices: int) -> dict[str, Any]:
    """Returns the code and hardware of a result: commit, versions, device and CPU cores.

    The cores are those that this process may use.
    """

    def git(arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments.split()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # git is not installed
            return ""
        return done.stdout.strip()

    # Writing a result changes a tracked file, but not the code that measures.
    changed = git("status --porcelain --untracked-files=no -- :/ :(top,exclude)results")
    return {
        "commit": (git("describe --always") or "unknown") + ("-dirty" if changed else ""),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "device": f"{num_devices} x {jax.devices()[0].device_kind}",
        "cores": num_cores(),
    }


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and renames it to `path` if the block succeeds.

    The file is thus whole or absent. Its folder is created if necessary.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all, and creates its folder."""
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      UserError: if the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # invalid JSON, or text that cannot be decoded
        raise UserError(f"{path} is damaged: {error}") from None


def provenance_of_run(workdir: Path) -> dict[str, Any] | None:
    """Returns the provenance of a run that experiments.paper.sweep trained, else None.

    The sweep's record of several seeds trained at once is in the folder above those of the seeds.
    """
    workdir = workdir.absolute()
    above = [workdir.parent] if workdir.name.startswith("seed-") else []
    for folder in (workdir, *above):
        record = folder / "sweep.json"
        if record.exists():
            return read_json(record)["provenance"]
    return None


def as_read(value: Any) -> Any:
    """Returns the value as a JSON file gives it back: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def resume(
    path: Path, header: Mapping[str, Any], *, field: str = "rows", any_commit: bool = False
) -> list[Row]:
    """Returns the rows of an earlier result with the same settings, or an empty list.

    If the file exists but cannot be resumed, one printed line says why.

    Args:
      path: the JSON file, which may be missing.
      header: fields that the earlier result must have with the same values.
      field: name of the list of rows in the file.
      any_commit: whether the rows may come from another commit, because each row records its own.
        If False, neither another commit nor uncommitted changes are accepted.
    """
    if not path.exists():
        return []
    wanted = as_read(header)
    try:
        earlier = read_json(path)
        rows = earlier[field]
        different = [name for name, value in wanted.items() if earlier.get(name) != value]
    except (UserError, KeyError, TypeError, AttributeError):
        say(f"{path} is not a result of this script: starting over")
        return []
    if any_commit and "commit" in different:
        different.remove("commit")
    if different:
        say(f"{path} has other values of {', '.join(different)}: starting over")
        return []
    if not any_commit and str(wanted.get("commit")).endswith("-dirty"):
        say(f"{path} is from uncommitted changes, which may have changed since: starting over")
        return []
    return rows
