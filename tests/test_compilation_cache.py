"""The compilation cache: one process fills it, and the next one reads it."""

import json
import subprocess
import sys

import pytest
from test_runs import ENVIRONMENT

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from skyformer_jax.training import compilation_cache

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
compilation_cache.use_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
out = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8)))
print(json.dumps([float(out.sum()), [e.rpartition("/")[2] for e in events]]))
"""


def start(directory, **environment):
    environment = {
        k: v for k, v in ENVIRONMENT.items() if k != "JAX_COMPILATION_CACHE_DIR"
    } | environment
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=100,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_second_process_does_not_compile_again(tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "other"
    first, events = start(cache)
    assert "cache_misses" in events and "cache_hits" not in events
    second, events = start(cache)
    assert "cache_misses" not in events and "cache_hits" in events
    assert second == first
    _, events = start(cache, JAX_COMPILATION_CACHE_DIR=str(other))  # the environment variable wins
    assert "cache_misses" in events and list(other.iterdir())
    (tmp_path / "file").touch()
    for directory in ("", tmp_path / "file" / "cache"):
        _, events = start(directory)
        assert not [e for e in events if "cache" in e and ("hit" in e or "miss" in e)]
