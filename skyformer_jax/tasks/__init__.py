"""What each benchmark task is: its data set, vocabulary, lengths, classes, floors."""

from collections.abc import Callable

from skyformer_jax.data import builders, listops
from skyformer_jax.data.batches import Examples
from skyformer_jax.data.builders import DOCUMENT_LENGTH, SPLITS
from skyformer_jax.errors import UserError
from skyformer_jax.tasks.task import Task

_BYTES = {"vocab_size": 257, "shift": 1}  # id 0 pads, byte b is b + 1


def _listops(load: Callable[[str], Examples], split: str, brackets: bool) -> Examples:
    """ListOps, with the closing brackets or, as the published code reads it, without."""
    examples = load(split)
    return examples if brackets else examples.select(examples.values != listops.CLOSE)


def _root_operator(examples: Examples) -> dict[str, float]:
    first_tokens = examples.values[examples.starts[:-1]]
    return {"root operator": listops.root_operator_floor(first_tokens, examples.label)}


def _text(
    load: Callable[[str], Examples], split: str, length: int, validate_on_test: bool
) -> Examples:
    """The first length bytes of each review.

    validate_on_test is the published code's: nothing is held out of train, and validation is test.
    """
    if not validate_on_test:
        return load(split).cut(length)
    if split == "train":
        return load("train").followed_by(load("validation")).cut(length)
    return load("test").cut(length)


def _retrieval(load: Callable[[str], Examples], split: str, length: int) -> Examples:
    """The first length bytes of each document."""
    return load(split).cut(length)


def _pixels(load: Callable[[str], Examples], split: str, shrink: int) -> Examples:
    """Images at full resolution, or at one that is shrink times lower."""
    return load(split).shrunk(shrink)


_GRAY = {  # every pixel is real, black ones included: nothing pads
    "vocab_size": 256,
    "options": {"shrink": 1},
    "variety": _pixels,
}


def pathfinder(
    name: str, size: int, difficulty: str = "hard", generated: str = "generated"
) -> Task:
    """A Pathfinder task.

    Args:
      name: of the task.
      size: pixels of a side: 32, 64, 128 or 256.
      difficulty: "easy", "intermediate" or "hard", which is the benchmark's.
      generated: "generated", 200,000 images, or "small", 20,000, where no source is named.
    """
    return Task(
        name,
        builders.Pathfinder,
        f"{generated}_{size}_{difficulty}",
        f"official_{size}_{difficulty}",
        max_length=size * size,
        **_GRAY,
    )


_LISTOPS = {
    "builder": builders.Listops,
    "vocab_size": listops.VOCAB_SIZE,
    "options": {"brackets": True},
    "variety": _listops,
    "more_floors": _root_operator,
}

BENCHMARK = (
    Task("listops", config="generated", source_config="official", max_length=2_000, **_LISTOPS),
    Task(
        "text",
        builders.Text,
        "imdb",
        "imdb",
        max_length=DOCUMENT_LENGTH,
        options={"length": DOCUMENT_LENGTH, "validate_on_test": False},
        variety=_text,
        **_BYTES,
    ),
    Task(
        "retrieval",
        builders.Retrieval,
        "aan",
        "aan",
        max_length=DOCUMENT_LENGTH,
        options={"length": DOCUMENT_LENGTH},
        variety=_retrieval,
        **_BYTES,
    ),
    Task("image", builders.Image, "cifar10", "cifar10", max_length=1_024, **_GRAY),
    pathfinder("pathfinder", 32),
    pathfinder("pathx", 128),
)
SMALL = (
    Task("listops_small", config="small", source_config=None, max_length=48, **_LISTOPS),
    pathfinder("pathfinder_small", 32, generated="small"),
    pathfinder("pathx_small", 128, generated="small"),
)
TASKS = {task.name: task for task in (*BENCHMARK, *SMALL)}
NAMES = tuple(TASKS)


def get(name: str) -> Task:
    """The task of that name; UserError if there is none (see NAMES)."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose one of: {', '.join(NAMES)}")
    return TASKS[name]


__all__ = ["BENCHMARK", "NAMES", "SPLITS", "TASKS", "Task", "get", "pathfinder"]
