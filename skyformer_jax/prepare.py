"""Prepares the data sets of the tasks, and prints what is in them.

python -m skyformer_jax.prepare --task=all [--source=DIR] [--data_dir=data]
python -m skyformer_jax.prepare --config=FILE: the task, folders and kind that a config names

Without a source, data sets that data_dir lacks are generated or downloaded. The source is a
published folder (lra_release, aclImdb or cifar-10-batches-bin), its archive, a folder in which TFDS
prepared imdb_reviews or cifar10, or a folder that holds several of these; docs/data.md lists more.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skyformer_jax.errors import UserError, lra_imports

with lra_imports():
    from absl import flags
    from ml_collections import config_flags

    from skyformer_jax import cli, tasks
    from skyformer_jax.data.examples import Examples
    from skyformer_jax.data.task import KINDS
    from skyformer_jax.files import expand
    from skyformer_jax.progress import say

_HEADER = (
    *("task", "split", "examples", "classes' shares"),
    *("mean length", "median", "p90", "longest", "MB on disk", "checksum"),
)


def row(task: str, split: str, examples: Examples, num_bytes: int) -> list[str]:
    """Returns one row of the table, as strings in the order of _HEADER.

    Args:
      task: the task's name.
      split: "train", "validation" or "test".
      examples: the split, with at least one example.
      num_bytes: size of the split's files on disk.
    """
    lengths = examples.lengths
    shares = np.bincount(examples.label) / len(examples)
    return [
        task,
        split,
        f"{len(examples):,}",
        f"{shares.min():.1%} - {shares.max():.1%}",
        f"{lengths.mean():.0f}",
        f"{np.median(lengths):.0f}",
        f"{np.percentile(lengths, 90):.0f}",
        f"{lengths.max()}",
        f"{num_bytes / 1e6:.1f}",
        examples.checksum(),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Formats the table: a header and the rows, as lines of aligned columns."""
    lines = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def rows_of(task: tasks.Task, data_dir: str, source: str | None, kind: str = "") -> list[list[str]]:
    """Prepares the data set of a task if it is missing, and returns a row for each split.

    Raises:
      UserError: as Task.load does.
    """
    rows = []
    kind = task.settled_kind(data_dir, source=source, kind=kind)
    for split in tasks.SPLITS:
        examples = task.load(split, data_dir, source=source, kind=kind)
        files = task.data_set(data_dir, source=source, kind=kind).info.splits[split].filepaths
        rows.append(row(task.name, split, examples, sum(map(os.path.getsize, files))))
    return rows


def main(name: str, data_dir: str, source: str | None, kind: str = "") -> None:
    """Prepares one task, or all six of the benchmark, and prints the table.

    Args:
      name: the task, one of tasks.NAMES, or "all". With "all", a task that fails does not keep the
        others from being prepared, and a task that the source does not hold is prepared as if no
        source were given.
      data_dir: folder of all data sets.
      source: folder or archive with the published files, or None.
      kind: "generated" or "published", for one task; "" chooses one as Task.settled_kind does.

    Raises:
      UserError: as Task.load does; with "all", after the other tasks are done, naming the tasks
        that failed.
    """
    if name == "all" and kind:
        raise UserError(f"--kind={kind} is for one task; name it by --task")
    if name != "all":
        print(table(rows_of(tasks.get(name), data_dir, source, kind)))
        return
    if source and not expand(source).exists():
        raise UserError(f"--source={source} does not exist")
    rows, failed = [], []
    for task in tasks.BENCHMARK:
        found = source if source and task.is_in(source) else None
        if source and not found:
            say(f"{source} does not hold {task.name}: prepared as without a source")
        try:
            rows += rows_of(task, data_dir, found)
        except UserError as error:
            failed.append(f"{task.name}: {error}")
            say(failed[-1])
    if rows:
        print(table(rows))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks.BENCHMARK)} tasks failed: {'; '.join(failed)}"
        )


def main_of_config(
    config: Mapping[str, Any], data_dir: str | None, source: str | None, kind: str
) -> None:
    """Prepares the task of a config, and prints the table, as main does.

    Arguments that are None or "" take their values from the config.

    Raises:
      UserError: as Task.load does.
    """
    data = config["data"]
    rows = rows_of(
        tasks.of(config), data_dir or data["dir"], source or data["source"], kind or data["kind"]
    )
    print(table(rows))


def command() -> None:
    """Runs the command line. Defines the flags here, so that an import of the module adds none."""
    task = flags.DEFINE_enum("task", None, ("all", *tasks.NAMES), "The task, or all six.")
    config = config_flags.DEFINE_config_file("config", None, "A config file, in place of --task.")
    source = flags.DEFINE_string("source", None, "Folder or archive of the published files.")
    data_dir = flags.DEFINE_string("data_dir", None, "Folder of all data sets; default: data.")
    kind = flags.DEFINE_enum(
        "kind",
        "",
        ("", *KINDS),
        "For one task; default: published with a source, else what data_dir holds, else generated.",
    )

    def _main() -> None:
        where = data_dir.value, source.value, kind.value
        if bool(flags.FLAGS["task"].present) == bool(flags.FLAGS["config"].present):
            raise UserError("name the task by --task, or its config file by --config")
        if flags.FLAGS["config"].present:
            path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
            if not expand(path).is_file():
                raise UserError(f"--config={path}: no such file")
            main_of_config(config.value, *where)
        else:
            main(task.value, where[0] or "data", *where[1:])

    cli.run(_main, __name__)


if __name__ == "__main__":
    command()
