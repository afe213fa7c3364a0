"""The tasks: the six of the Long Range Arena, smaller and easier ones, and the user's own."""

from collections.abc import Mapping
from typing import Any

from skyformer_jax.data import own, pathfinder
from skyformer_jax.data.image import IMAGE
from skyformer_jax.data.listops import LISTOPS, LISTOPS_SMALL
from skyformer_jax.data.retrieval import RETRIEVAL
from skyformer_jax.data.splits import SPLITS
from skyformer_jax.data.task import Task
from skyformer_jax.data.text import TEXT
from skyformer_jax.errors import UserError, one_of

BENCHMARK = (LISTOPS, TEXT, RETRIEVAL, IMAGE, pathfinder.PATHFINDER, pathfinder.PATHX)
SMALL = (LISTOPS_SMALL, pathfinder.PATHFINDER_SMALL, pathfinder.PATHX_SMALL)
EASIER = (
    pathfinder.PATHFINDER_SHORT,
    pathfinder.PATHFINDER_EASY,
    pathfinder.PATHFINDER_INTERMEDIATE,
)
TASKS = {task.name: task for task in (*BENCHMARK, *SMALL, *EASIER)}
NAMES = tuple(TASKS)


def get(name: str) -> Task:
    """Returns the task of this name.

    Raises:
      UserError: if name is not one of NAMES.
    """
    return TASKS[one_of("task", name, TASKS)]


def define(
    name: str, *, inputs: str, classes: own.Classes, max_length: int, num_documents: int = 1
) -> Task:
    """Defines a new task: see skyformer_jax.data.own.make_task and docs/your_own_data.md.

    Raises:
      UserError: as make_task does; or if a task of this package has the same name.
    """
    if name in TASKS:
        raise UserError(f"a task of this package is named {name!r}; choose another name")
    return own.make_task(
        name,
        inputs=inputs,
        classes=classes,
        max_length=max_length,
        num_documents=num_documents,
    )


def of(config: Mapping[str, Any]) -> Task:
    """Returns the task of a config: the one that config.own_task defines, or else config.task.

    Raises:
      UserError: as get and define do.
    """
    definition = config.get("own_task")
    if not definition:
        return get(config["task"])
    fields = own.check_definition(definition)
    return define(config["task"], **fields)


__all__ = [
    "BENCHMARK",
    "EASIER",
    "NAMES",
    "SMALL",
    "SPLITS",
    "TASKS",
    "Task",
    "define",
    "get",
    "of",
]
