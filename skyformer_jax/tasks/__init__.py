"""What each benchmark task is: its data set, vocabulary, lengths, classes, floors."""

from skyformer_jax.errors import UserError
from skyformer_jax.tasks.listops import LISTOPS, LISTOPS_SMALL, ListopsTask

SPLITS = ("train", "validation", "test")
TASKS = {task.name: task for task in (LISTOPS, LISTOPS_SMALL)}
NAMES = tuple(TASKS)


def get(name: str) -> ListopsTask:
    """The task of that name; UserError if there is none (see NAMES)."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose one of: {', '.join(NAMES)}")
    return TASKS[name]


__all__ = ["NAMES", "SPLITS", "TASKS", "get"]
