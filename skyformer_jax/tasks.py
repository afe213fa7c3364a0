"""The tasks by name: the six of the Long Range Arena, and smaller ones for a CPU."""

from skyformer_jax.data.image import IMAGE
from skyformer_jax.data.listops import LISTOPS, LISTOPS_SMALL
from skyformer_jax.data.pathfinder import PATHFINDER, PATHFINDER_SMALL, PATHX, PATHX_SMALL
from skyformer_jax.data.retrieval import RETRIEVAL
from skyformer_jax.data.splits import SPLITS
from skyformer_jax.data.task import Task
from skyformer_jax.data.text import TEXT
from skyformer_jax.errors import one_of

BENCHMARK = (LISTOPS, TEXT, RETRIEVAL, IMAGE, PATHFINDER, PATHX)
SMALL = (LISTOPS_SMALL, PATHFINDER_SMALL, PATHX_SMALL)
TASKS = {task.name: task for task in (*BENCHMARK, *SMALL)}
NAMES = tuple(TASKS)


def get(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: if there is none; NAMES lists them.
    """
    return TASKS[one_of("task", name, TASKS)]


__all__ = ["BENCHMARK", "NAMES", "SMALL", "SPLITS", "TASKS", "Task", "get"]
