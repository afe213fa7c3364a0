"""Prepares a task's data set, and says what is in it.

python -m skyformer_jax.data.prepare --task=listops [--source=DIR] [--data_dir=data]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from skyformer_jax import cli, tasks
from skyformer_jax.data import builders

_HEADER = ("task", "split", "examples", "label share", "mean", "median", "p90", "MB on disk")


def row(task: str, split: str, examples: Sequence[Mapping[str, Any]], num_bytes: int) -> list[str]:
    """One line of the table, as text in the order of _HEADER.

    Args:
      task: name of the task.
      split: name of the split.
      examples: at least one {"tokens": integers, "label": int}.
      num_bytes: the split's files on disk.
    """
    lengths = np.array([len(example["tokens"]) for example in examples])
    _, counts = np.unique([example["label"] for example in examples], return_counts=True)
    shares = counts / counts.sum()
    return [
        task,
        split,
        f"{len(examples):,}",
        f"{shares.min():.1%} - {shares.max():.1%}",
        f"{lengths.mean():.0f}",
        f"{np.median(lengths):.0f}",
        f"{np.percentile(lengths, 90):.0f}",
        f"{num_bytes / 1e6:.1f}",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows below _HEADER, in columns as wide as their widest text."""
    lines = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(task_name: str, data_dir: str, source: str | None) -> None:
    """Prepares what is missing and prints the table.

    Raises:
      UserError: as the task's load.
    """
    task = tasks.get(task_name)
    variety = "official" if source else task.variety
    rows = []
    for split in tasks.SPLITS:
        examples = task.load(split, data_dir, source=source)
        builder = builders.Listops(
            config=variety, data_dir=str(Path(data_dir).expanduser()), file_format="array_record"
        )
        files = builder.info.splits[split].filepaths
        rows.append(row(task.name, split, examples, sum(file.stat().length for file in files)))
    print(table(rows))


if __name__ == "__main__":
    # Defined here, so that importing this module adds no flags to another program.
    _TASK = flags.DEFINE_enum("task", None, tasks.NAMES, "Which task's data set.", required=True)
    _SOURCE = flags.DEFINE_string(
        "source", None, "Folder of the published files, if not generated."
    )
    _DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of all data sets.")
    cli.run(lambda: main(_TASK.value, _DATA_DIR.value, _SOURCE.value))
