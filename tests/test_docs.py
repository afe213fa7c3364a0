"""The site's reference and the citation name what the package has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skyformer_jax
from experiments.paper.report import tables
from skyformer_jax import attention

ROOT = Path(__file__).parent.parent


def test_every_public_function_of_attention_is_in_the_reference():
    page = (ROOT / "docs/api/attention.rst").read_text()
    functions = {name for name in attention.__all__ if not name.isupper()}
    found = re.findall(r"autofunction:: skyformer_jax\.attention\.(\w+)$", page, re.MULTILINE)
    assert functions <= set(found)


def test_every_attention_has_a_section():
    page = (ROOT / "docs/api/attention.rst").read_text()
    for entry in attention.REGISTRY.values():
        assert f"automodule:: {entry.function.__module__}\n" in page


def test_the_citation_is_of_this_version():
    version = skyformer_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "fast"), ("docs/reproduction.md", "table1")]
)
def test_pages_show_the_measured_accuracies(page, name):
    result = json.loads((ROOT / f"results/{name}.json").read_text())
    assert tables.summary(result) in (ROOT / page).read_text()


def code_blocks():
    """Those of all pages but one whose code goes into the package, and one with its own test."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    return [
        pytest.param(block, id=f"{path.name}-{number}")
        for path in pages
        if path.name not in ("adding_an_attention.md", "your_own_data.md")
        for number, block in enumerate(
            re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", code_blocks())
def test_code_runs_as_written(block, tmp_path):
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        check=True,
    )


def test_links_of_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", page.read_text()):
            there = page.parent / target
            # The site puts these together from elsewhere.
            made = target.startswith("project/")
            assert made or there.exists(), f"{page.name}: {target}"
