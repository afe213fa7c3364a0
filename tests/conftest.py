"""Sets eight fake CPU devices and a shared compilation cache before jax is imported."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests spend their time compiling, not computing, so optimizations do not pay off.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions reject the flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # these compile slowly
# With fewer threads than devices, collectives of the fake devices can deadlock.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no server: tests never download gigabytes
# All test processes inherit this cache, since many of them compile the same programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="skyformer-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The data directory with small ListOps, prepared once for all test processes."""
    from skyformer_jax import tasks  # imported late, because it imports jax

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    tasks.get("listops_small").load("test", folder / "small")
    return folder / "small"
