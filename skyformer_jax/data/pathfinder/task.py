"""The tasks of Pathfinder."""

from skyformer_jax.data.pathfinder.builder import Pathfinder
from skyformer_jax.data.task import Task, shrink_images
from skyformer_jax.data.tokenizer import IDENTITY


def make_task(name: str, size: int, difficulty: str = "hard", generated: str = "generated") -> Task:
    """Makes a Pathfinder task.

    Args:
      name: name of the task.
      size: pixels of a side: 32, 64, 128 or 256.
      difficulty: "easy", "intermediate" or "hard", which is the benchmark's.
      generated: what is generated if no source is named: "generated", 200,000 images, or "small",
        20,000.
    """
    return Task(
        name=name,
        builder=Pathfinder,
        config=f"{generated}_{size}_{difficulty}",
        source_config=f"official_{size}_{difficulty}",
        max_length=size * size,
        tokenizer=IDENTITY,  # every pixel is real, black ones included: nothing pads
        options={"shrink": 1},
        make_split=shrink_images,
    )


PATHFINDER = make_task("pathfinder", 32)
PATHFINDER_SMALL = make_task("pathfinder_small", 32, generated="small")
PATHX = make_task("pathx", 128)
PATHX_SMALL = make_task("pathx_small", 128, generated="small")
