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
    """What code and hardware a result comes from: commit, versions, device and cores.

    The cores are those that this process may use.
    """

    def git(arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments.split()]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # A new result changes a tracked file, but not the code that measures.
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


def provenance_of_run(workdir: Path) -> dict[str, Any] | None:
    """The provenance of a run that experiments.paper.sweep trained; None of another's."""
    record = workdir / "sweep.json"
    return read_json(record)["provenance"] if record.exists() else None


def as_read(value: Any) -> Any:
    """The value as a JSON file gives it back: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def resume(
    path: Path, header: Mapping[str, Any], *, field: str = "rows", any_commit: bool = False
) -> list[Row]:
    """The rows of an earlier result of the same settings; else none, and one line says why.

    Args:
      path: the JSON file, which need not be there.
      header: fields that the earlier result must have with the same values.
      field: name of the list of rows in the file.
      any_commit: whether the rows may be of other code, because each says its own commit. If not,
        neither another commit nor uncommitted changes are accepted.
    """
    if not path.exists():
        return []
    wanted = as_read(header)
    try:
        earlier = read_json(path)
        rows = earlier[field]
        different = [name for name, value in wanted.items() if earlier.get(name) != value]
    except (UserError, KeyError, TypeError, AttributeError):
        say(f"{path} is no result of this script: begun anew")
        return []
    if any_commit and "commit" in different:
        different.remove("commit")
    if different:
        say(f"{path} is of other {', '.join(different)}: begun anew")
        return []
    if not any_commit and str(wanted.get("commit")).endswith("-dirty"):
        say(f"{path} is of uncommitted changes, maybe not of those of now: begun anew")
        return []
    return rows
