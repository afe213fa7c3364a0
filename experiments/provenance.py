"""What a result was measured with."""

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
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": done.stdout.strip() or "unknown",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "device": f"{num_devices} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
    }
