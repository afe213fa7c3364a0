"""The site: sphinx-build -W --keep-going -b html docs build/docs.

What lies elsewhere in the repository (notebooks, the report, the changelog) is copied below docs
before each build, with its relative links put right; git ignores the copies. Nothing is executed.
"""

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
from flax import nnx
from sphinx.application import Sphinx
from sphinx.util import inspect

import skyformer_jax

_DOCS = Path(__file__).parent
_ROOT = _DOCS.parent
sys.path.insert(0, str(_ROOT))  # experiments/ is not installed
_COPIES = {
    "results/REPORT.md": "docs/project/results.md",
    "CHANGELOG.md": "docs/project/changelog.md",
    "CONTRIBUTING.md": "docs/project/contributing.md",
    **{
        f"notebooks/{path.name}": f"docs/notebooks/{path.name}"
        for path in sorted((_ROOT / "notebooks").glob("*.ipynb"))
    },
}

project = "skyformer_jax"
author = "skyformer_jax contributors"
copyright = "2026, skyformer_jax contributors"
release = skyformer_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["**.ipynb_checkpoints"]

nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"
smartquotes = False  # they would make one dash of the two before a flag
highlight_language = "text"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_use_rtype = False  # what a colon follows in our "Returns" is seldom a type
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = f"skyformer_jax {release}"


def _rebased(markdown: str, source: str, target: str) -> str:
    """The text with its relative links, written for source, as they are from target.

    Links to the README lead to the site's first page, and those to folders become plain text.

    Args:
      markdown: text of a page or of a notebook's cell.
      source: its path in the repository.
      target: the path of its copy.
    """

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (_ROOT / path).is_dir():
            return text
        if path == "README.md":
            path, anchor = "docs/index.md", None
        path = posixpath.relpath(_COPIES.get(path, path), posixpath.dirname(target))
        return f"[{text}]({path}{anchor or ''})"

    return re.sub(r"\[([^]]*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def _copy(source: str, target: str) -> None:
    text = (_ROOT / source).read_text()
    if source.endswith(".ipynb"):
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _rebased("".join(cell["source"]), source, target)
        text = json.dumps(notebook)
    else:
        text = _rebased(text, source, target)
    (_ROOT / target).write_text(text)


def _mark_equations(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Makes literal blocks of the equations and code in a docstring.

    These are what is indented by four after an empty line, below text that is not indented.
    """
    for i in range(len(lines) - 1, 1, -1):
        text, empty, line = lines[i - 2 : i + 1]
        if line.startswith("    ") and not empty and not text.startswith(" "):
            lines[i:i] = [] if text.endswith("::") else ["::", ""]


def _sign(
    _app: Sphinx,
    what: str,
    _name: str,
    thing: Any,
    _options: Any,
    signature: str | None,
    returns: str,
) -> tuple[str | None, str]:
    """Signatures of a module's own arguments, and without addresses of default functions."""
    if what == "class" and issubclass(thing, nn.Module) and signature:  # linen adds some to all
        signature = re.sub(r", parent: .*\)$", ")", signature)
    elif what == "class" and issubclass(thing, nnx.Module):  # NNX hides them
        own = inspect.signature(thing.__init__, bound_method=True)
        signature = inspect.stringify_signature(own, show_return_annotation=False)
    return signature and re.sub(r"<[^<>]+>", "...", signature), returns


def setup(app: Sphinx) -> None:
    """Copies, and connects what reads docstrings."""
    for old in [*(_DOCS / "notebooks").glob("*.ipynb"), *(_DOCS / "project").glob("*.md")]:
        old.unlink()
    for source, target in _COPIES.items():
        (_ROOT / target).parent.mkdir(exist_ok=True)
        if (_ROOT / source).exists():
            _copy(source, target)
        else:
            (_ROOT / target).write_text(f"# {source}\n\nThis checkout has none.\n")
    app.connect("autodoc-process-docstring", _mark_equations, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _sign)
