"""Renders results/REPORT.md and its pictures from the JSON of experiments/, and from that alone.

python -m experiments.paper.report
python -m experiments.paper.report --results=DIR
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from absl import flags

from experiments.paper.report import claims, pictures, tables
from experiments.paper.report.statistics import Result
from experiments.records import read_json, replacing
from skyformer_jax import cli
from skyformer_jax.errors import UserError

_RESULTS = flags.DEFINE_string(
    "results", "results", "Folder of the JSON files; gets REPORT.md and the pictures."
)


# {name of the result: (title, function that makes the text, function that draws the picture)}
SECTIONS: dict[str, tuple[str, Callable[[Result], str], Callable[[Result, Path], None]]] = {
    "table1": ("Table 1: accuracy", tables.table1, pictures.table1),
    "table2": ("Table 2: time and memory", tables.table2, pictures.table2),
    "figure1": ("Figure 1: error", tables.figure1, pictures.figure1),
    "figure2": ("Figure 2: accuracy against time", tables.figure2, pictures.figure2),
    "stability": ("Appendix table 1: instability", tables.stability, pictures.stability),
    "singular_values": (
        "Appendix figure 2: singular values",
        tables.singular_values,
        pictures.singular_values,
    ),
}


def read_results(folder: Path) -> dict[str, Result]:
    """Reads the results in a folder, {name of the file without .json: content}.

    Raises:
      UserError: if the folder is missing, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"--results={folder} is not a folder; name the one with the JSON files")
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results[path.stem] = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; measure it again") from None
    return results


def render(results: dict[str, Result]) -> str:
    """Returns the report as Markdown.

    Raises:
      UserError: if a result lacks a field that its script writes today.
    """
    sections = []
    for name, (title, make_text, _) in SECTIONS.items():
        sections.append(f"## {title}")
        if name not in results:
            sections.append(f"Not yet run: `python -m experiments.paper.{name}`.")
            continue
        try:
            sections += [tables.origin(results[name]), make_text(results[name])]
        except KeyError as error:
            raise UserError(
                f"{name}.json has no {error}: an earlier experiments/paper/{name}.py wrote it; "
                "measure it again"
            ) from None
        sections.append(f"![{title}]({name}.png)")
    verdicts = claims.judge(results)
    count = Counter(verdict.status for verdict in verdicts)
    statuses = (claims.CONFIRMED, claims.NOT_CONFIRMED, claims.NOT_RUN)
    rows = []
    for claim, rule, status, reduced, evidence in verdicts:
        runs = "-" if status == claims.NOT_RUN else "reduced" if reduced else "full"
        rows.append([claim, f"**{status}**", runs, evidence or "-", rule])
    parts = [
        "# The paper and this code",
        "Made by `python -m experiments.paper.report` from the JSON beside it, and from that "
        'alone: do not edit. The paper is Chen, Zeng, Ji, Yang, "Skyformer", NeurIPS 2021. Each '
        "section says how its runs are reduced against the paper's: a reduced run neither confirms "
        "nor refutes what the paper says of 50,000 steps, only what it says of itself.",
        "## Claims of the paper",
        f"In these runs {', '.join(f'{count[status]} {status}' for status in statuses)}.",
        tables.markdown(["claim", "here", "runs", "evidence", "confirmed if"], rows),
        *sections,
        "## All results",
        tables.everything(results),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the report and draws its pictures."""
    folder = Path(_RESULTS.value)
    results = read_results(folder)
    text = render(results)
    for name, (_, _, draw) in SECTIONS.items():
        if name in results:
            draw(results[name], folder / f"{name}.png")
    path = folder / "REPORT.md"
    with replacing(path) as part:
        part.write_text(text)
    print(path)


if __name__ == "__main__":
    cli.run(main)
