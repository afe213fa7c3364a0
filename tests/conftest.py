"""Eight fake CPU devices for every test, and one compilation cache, set before jax starts."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile much and compute little.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # they compile slowly
# With fewer threads than devices, collectives of fake devices can wait for each other for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody there: no test downloads gigabytes
# Shared by all processes of the tests, which inherit it: many compile the same programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="skyformer-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The small ListOps, prepared once for all processes of the tests."""
    from skyformer_jax import tasks  # late: it imports jax

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    tasks.get("listops_small").load("test", folder / "small")
    return folder / "small"
