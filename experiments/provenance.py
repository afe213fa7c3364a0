"""What a result was measured with, and how it is written."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib


def provenance(num_devices: int) -> dict[str, Any]:
    """The fields of a result's JSON that say what code and hardware it comes from.

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

    # A result that is written anew changes a tracked file, but not the code it comes from.
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


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
