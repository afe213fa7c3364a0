"""The tasks of Pathfinder."""

from skyformer_jax.data.pathfinder.builder import Pathfinder
from skyformer_jax.data.pathfinder.parameters import PUBLISHED
from skyformer_jax.data.task import Task, shrink_images
from skyformer_jax.data.tokenizer import IDENTITY


def make_task(name: str, size: int, difficulty: str = "hard", generated: str = "generated") -> Task:
    """Makes a Pathfinder task.

    Args:
      name: name to give the task.
      size: height and width in pixels: 32, 64, 128 or 256.
      difficulty: "short", "easy", "intermediate" or "hard"; the benchmark's is "hard". "short" has
        no published files.
      generated: which data set is generated if no source is given: "generated" with 200,000 images,
        or "small" with 20,000.
    """
    return Task(
        name=name,
        builder=Pathfinder,
        config=f"{generated}_{size}_{difficulty}",
        source_config=f"official_{size}_{difficulty}" if difficulty in PUBLISHED else None,
        max_length=size * size,
        tokenizer=IDENTITY,  # id 0 is a black pixel; no image is padded
        options={"shrink": 1},
        make_split=shrink_images,
    )


PATHFINDER = make_task("pathfinder", 32)
PATHFINDER_SHORT = make_task("pathfinder_short", 32, "short", generated="small")
PATHFINDER_EASY = make_task("pathfinder_easy", 32, "easy")
PATHFINDER_INTERMEDIATE = make_task("pathfinder_intermediate", 32, "intermediate")
PATHFINDER_SMALL = make_task("pathfinder_small", 32, generated="small")
PATHX = make_task("pathx", 128)
PATHX_SMALL = make_task("pathx_small", 128, generated="small")
