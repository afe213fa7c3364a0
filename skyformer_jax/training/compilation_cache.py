"""Compiled programs on disk, so that a second start does not compile again."""

import hashlib
import tempfile
from pathlib import Path

import jax

from skyformer_jax.progress import say


def use_cache(directory: str) -> None:
    """Keeps programs that take over a second to compile in a folder, for later processes too.

    Args:
      directory: the folder, made if it is missing; "" keeps nothing. If nothing can be written
        there, a line says so and nothing is kept. The environment variable
        JAX_COMPILATION_CACHE_DIR, if set, names another folder that is used instead.
    """
    if directory and not jax.config.values["jax_compilation_cache_dir"]:
        try:
            path = Path(directory).expanduser() / _processor()
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            say(f"compilation_cache={directory}: {reason}; programs are not kept")
            return
        jax.config.update("jax_compilation_cache_dir", str(path))


def _processor() -> str:
    """A name for the CPU's instruction set, which JAX does not make part of its cache keys.

    A home folder may be shared by machines of several kinds.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(features).encode()).hexdigest()[:8]
