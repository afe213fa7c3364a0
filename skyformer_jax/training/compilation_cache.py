"""Caches compiled programs on disk, so that later processes need not compile them again."""

import hashlib
import tempfile
from pathlib import Path

import jax

from skyformer_jax.progress import say


def use_cache(directory: str) -> None:
    """Caches programs that take over a second to compile in a folder, for later processes.

    Args:
      directory: the folder, created if it is missing; "" disables the cache. If the folder is not
        writable, a line says so and nothing is cached. If the environment variable
        JAX_COMPILATION_CACHE_DIR is set, its folder is used instead.
    """
    if directory and not jax.config.values["jax_compilation_cache_dir"]:
        try:
            path = Path(directory).expanduser() / _processor()
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            say(f"compilation_cache={directory}: {reason}; compiled programs are not cached")
            return
        jax.config.update("jax_compilation_cache_dir", str(path))


def _processor() -> str:
    """Returns a name for the CPU's instruction set, which JAX's cache keys do not include.

    Machines with different CPUs may share a home folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(features).encode()).hexdigest()[:8]
