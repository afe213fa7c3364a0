"""The site's reference and the citation name what the package has."""

import re
import tomllib
from pathlib import Path

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
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()
