"""The documentation and the citation agree with the package."""

import functools
import importlib
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skyformer_jax
from configs import quickstart
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
    ("page", "name"),
    [("README.md", "fast"), ("docs/reproduction.md", "fast"), ("docs/reproduction.md", "table1")],
)
def test_pages_show_the_measured_accuracies(page, name):
    result = json.loads((ROOT / f"results/{name}.json").read_text())
    assert tables.summary(result) in (ROOT / page).read_text()


def test_pages_show_the_measured_language_models():
    text, last = (ROOT / "docs/causal.md").read_text(), {}
    for row in json.loads((ROOT / "results/language_model.json").read_text())["rows"]:
        speeds = " | ".join(f"{run['tokens_per_second']:,.0f}" for run in row["decoding"])
        state = row["decoding"][-1]["state_bytes"]
        assert f"| {row['bits_per_byte']:.2f} | {speeds} | {state / 2**20:.2f} MiB |" in text
        last[row["attention"]] = speeds.split()[-1], f"{state / 2**10:,.0f}"
    speed, state = last["skyformer-conv"]
    sentence = (
        f"{speed} tokens a second from {state} KiB, where softmax writes {last['softmax'][0]}"
    )
    assert sentence in " ".join((ROOT / "README.md").read_text().split())


def code_blocks():
    """Python blocks of the pages.

    Leaves out adding_an_attention.md, whose code goes into the package, published_weights.md, which
    needs PyTorch and a checkpoint of its own, and your_own_data.md, which has its own test.
    """
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    return [
        pytest.param(block, id=f"{path.name}-{number}")
        for path in pages
        if path.name not in ("adding_an_attention.md", "published_weights.md", "your_own_data.md")
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


def pages_with_text():
    """Every page of the repository and every notebook, with its Markdown."""
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/REPORT.md")
    folders = ("docs", "docs/notebooks", "notebooks")
    for page in (ROOT / name for name in names):
        yield page, page.read_text()
    for page in (page for folder in folders for page in (ROOT / folder).glob("*.md")):
        yield page, page.read_text()
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        yield path, "\n".join(text)


def anchors(text):
    """The anchors that GitHub and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_pages_lead_somewhere():
    for page, text in pages_with_text():
        links = re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)", text)
        cards = re.findall(r"^:link: (.*)$", text, re.MULTILINE)
        for target, anchor in [*links, *((f"{card}.md", "") for card in cards)]:
            if page.parent.name == "docs" and re.match(r"project/|notebooks/\d", target):
                continue  # the site copies these from elsewhere
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(there.read_text()), f"{page.name}: {target}#{anchor}"


def test_every_page_is_on_the_site():
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"\n{page.stem}\n" in index, page.name


def commands():
    """The commands in code of all pages, as lists of words, with the names of the pages."""
    for page, text in pages_with_text():
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        inline = [part.replace("\n", " ") for part in re.findall(r"`(python [^`]*)`", rest)]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in lines + inline:
            for part in re.split(r"&&|;", line.partition(" #")[0]):
                words = part.split()
                if "python" in words:
                    yield page.name, words[words.index("python") + 1 :]


def defined_flags(path, seen):
    """The flags that a script defines, and those of the modules of this repository it imports."""
    if path in seen or not path.exists():
        return set()
    seen.add(path)
    text = path.read_text()
    found = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))
    for package, names in re.findall(r"^\s*from ([\w.]+) import ([\w, ]+)$", text, re.MULTILINE):
        folder = ROOT / package.replace(".", "/")
        for module in (folder.with_suffix(".py"), *(folder / f"{n}.py" for n in names.split(", "))):
            found |= defined_flags(module, seen)
    return found


def script(words):
    """The file that a command runs, and its arguments; None for files that a page has written."""
    if words[0] == "-m":
        path = ROOT / words[1].replace(".", "/")
        return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")), words[2:]
    return (None if words[0].startswith(("~", "-c")) else ROOT / words[0]), words[1:]


def test_commands_of_the_pages_can_be_given():
    count = 0
    for page, words in commands():
        path, arguments = script(words)
        if path is None:
            continue
        assert path.exists(), f"{page}: {words}"
        own = ROOT / "skyformer_jax" / path.name  # train.py and eval.py only call these
        known = defined_flags(path, set()) | defined_flags(own, set()) | {"config", "help"}
        config = None
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name == "--config" and value.startswith("configs/"):
                file, _, chosen = value.partition(":")
                module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
                config = module.get_config(chosen.replace("ATTENTION", "skyformer"))
            elif name.startswith("--config."):
                config = config or quickstart.get_config()
                fields = name.split(".")[1:]
                functools.reduce(operator.getitem, fields, config)
            elif name.startswith("--"):
                assert name[2:].removeprefix("no") in known or name[2:] in known, f"{page}: {words}"
            count += 1
    assert count > 100
