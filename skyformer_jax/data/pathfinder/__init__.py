"""Pathfinder: are two tips the ends of one contour? (Linsley et al., 2018, arXiv 1805.08315).

Two long contours of dashes, the targets, lie among short ones, the distractors. A disc marks the
beginning of one target; another marks the end of the same target (label 1) or of the other (0).

The generator draws from the same distribution as the published one
(github.com/drewlinsley/pathfinder), peculiarities included, because the benchmark's images come
from it. A contour begins with a dash of random orientation. Each further dash points from a pivot,
which lies a margin ahead of the last dash, to a random point on a circle around the pivot. Points
ahead are more probable than points to the side. Every dash blocks its surroundings up to a margin;
a contour that cannot be continued is given up.

A dash has one of a few hundred orientations and integer coordinates, so every dash is drawn only
once, together with the area that it blocks, and then copied. Most pairs of targets are given up (at
64 pixels and "hard", a thousand for each that succeeds), so many are tried at once.
"""

from skyformer_jax.data.pathfinder.builder import Pathfinder, PathfinderConfig
from skyformer_jax.data.pathfinder.drawing import draw
from skyformer_jax.data.pathfinder.generator import (
    CHUNK,
    chunk_sizes,
    chunks,
    generate,
    generate_chunk,
)
from skyformer_jax.data.pathfinder.parameters import DIFFICULTIES, SIZES, Settings, settings
from skyformer_jax.data.pathfinder.reader import find_metadata, read_folder
from skyformer_jax.data.pathfinder.task import (
    PATHFINDER,
    PATHFINDER_EASY,
    PATHFINDER_INTERMEDIATE,
    PATHFINDER_SHORT,
    PATHFINDER_SMALL,
    PATHX,
    PATHX_SMALL,
    make_task,
)

__all__ = [
    "CHUNK",
    "DIFFICULTIES",
    "PATHFINDER",
    "PATHFINDER_EASY",
    "PATHFINDER_INTERMEDIATE",
    "PATHFINDER_SHORT",
    "PATHFINDER_SMALL",
    "PATHX",
    "PATHX_SMALL",
    "SIZES",
    "Pathfinder",
    "PathfinderConfig",
    "Settings",
    "chunk_sizes",
    "chunks",
    "draw",
    "find_metadata",
    "generate",
    "generate_chunk",
    "make_task",
    "read_folder",
    "settings",
]
