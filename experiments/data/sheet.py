"""Measures the numbers of docs/data.md: each data set's preparation time, size and content.

    python -m experiments.data.sheet --tasks=listops,text --source=DIR --work=FOLDER

Each task is prepared from scratch, in its own folder below --work, and then read as stored.
Pathfinder takes minutes, Path-X half an hour.
"""

import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments.records import Row, provenance, write_json
from skyformer_jax import cli, tasks
from skyformer_jax.data import store
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError

_TASKS = flags.DEFINE_list("tasks", ["listops", "text", "image", "pathfinder"], "Tasks to measure.")
_SOURCE = flags.DEFINE_string("source", None, "Folder of published files, for the tasks it has.")
_WORK = flags.DEFINE_string("work", None, "Folder of the prepared data; kept.", required=True)
_OUT = flags.DEFINE_string("out", "results/data_sheet.json", "File to write.")


def describe_split(task: tasks.Task, whole: Examples, read: Examples) -> Row:
    """Describes a split as stored, and the part of it that the task reads by default."""
    lengths = whole.lengths
    described = {
        "examples": len(whole),
        "checksum": read.checksum(),
        "shares_of_classes": (np.bincount(whole.label) / len(whole)).round(4).tolist(),
        "length": {
            "shortest": int(lengths.min()),
            "mean": float(read.lengths.mean()),
            "longest": int(lengths.max()),
            "share_cut": float((lengths > read.lengths).mean()),
        },
        "distinct_values": len(np.unique(whole.values)),
        "share_of_value_0": float((whole.values == 0).mean()),
        "floors": task.floors(read),
    }
    if "brackets" in task.options:
        bare = task.make_split(lambda split: whole, "", brackets=False)
        described["mean_length_without_brackets"] = float(bare.lengths.mean())
    return described


def measure(name: str) -> Row:
    """Prepares a task's data set, reads it, and returns its entry of the JSON."""
    task, data_dir = tasks.get(name), Path(_WORK.value) / name
    if data_dir.exists():
        raise UserError(f"{data_dir} exists; name another --work, or delete it to measure again")
    source = _SOURCE.value if _SOURCE.value and task.is_in(_SOURCE.value) else None
    data_set = task.data_set(str(data_dir), source=source)
    start = time.perf_counter()
    store.prepare(data_set, source)
    seconds = time.perf_counter() - start
    files = [path for path in Path(data_set.data_dir).rglob("*") if path.is_file()]
    return {
        "data": store.describe(data_set),
        "seconds_to_prepare": seconds,
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "splits": {
            split: describe_split(
                task, store.load(data_set, split), task.load(split, str(data_dir), source=source)
            )
            for split in tasks.SPLITS
        },
    }


def main() -> None:
    """Measures the tasks one after the other and writes the JSON."""
    result = {
        "what": "preparation of the data sets from nothing, and what is in them",
        **provenance(1),
        "tasks": {name: measure(name) for name in _TASKS.value},
    }
    write_json(Path(_OUT.value), result)


if __name__ == "__main__":
    cli.run(main)
