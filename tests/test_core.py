"""The core needs only jax, flax and numpy."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"jax", "flax", "numpy", "skyformer_jax"} | sys.stdlib_module_names
CORE = {"skyformer_jax", "skyformer_jax.attention", "skyformer_jax.attention.skyformer"} | {
    f"skyformer_jax.{name}" for name in ("errors", "layers", "nnx_layers", "models", "convert")
}


@pytest.fixture(scope="module")
def core():
    """The modules that core_only.py imported and the names it found exported."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/core_only.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_works_without_the_packages_of_the_benchmark(core):
    assert core["modules"].keys() >= CORE
    assert not [
        name for name in core["modules"] if name.split(".")[1:2] in (["data"], ["training"])
    ]


def test_it_exports_the_attentions(core):
    names = "softmax kernelized skyformer nystromformer linformer informer performer reformer"
    functions = {f"{name}_attention" for name in [*names.split(), "bigbird"]}
    assert set(core["exported"]) == {"__version__", "attention_fn", "load_pretrained"} | functions


def imported(file):
    """Yields the top-level packages that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module.partition(".")[0]


def test_it_imports_jax_flax_and_numpy_alone(core):
    """Flax itself imports absl, optax and orbax; the core must not rely on that."""
    for name, file in core["modules"].items():
        assert set(imported(file)) <= ALLOWED, name


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--config=configs/quickstart.py"],
        ["eval.py", "--workdir=runs/none"],
        ["-m", "skyformer_jax.prepare", "--task=text"],
    ],
)
def test_commands_of_the_benchmark_name_the_extra(command, tmp_path):
    """Without the benchmark's packages, its commands fail with one line that names the extra."""
    missing = (ROOT / "tests/core_only.py").read_text().partition("import skyformer_jax\n")[0]
    (tmp_path / "sitecustomize.py").write_text(missing)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "is not installed" in line and 'pip install "skyformer_jax[lra]"' in line
