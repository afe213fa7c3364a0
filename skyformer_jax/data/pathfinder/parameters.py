"""How images of each size and difficulty are drawn in the benchmark."""

from typing import NamedTuple

from skyformer_jax.errors import UserError

SIZES = (32, 64, 128, 256)
# Number of dashes of each target. "short" is ours, to begin a curriculum with; the others are the
# benchmark's.
DIFFICULTIES = {"short": 3, "easy": 6, "intermediate": 9, "hard": 14}
PUBLISHED = {  # the folders of the benchmark's images
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}


class Settings(NamedTuple):
    """How images of a size and difficulty are drawn; lengths are in pixels.

    Attributes:
      size: height and width.
      target_dashes: number of dashes of each target.
      distractor_dashes: number of dashes of a distractor.
      num_distractors: number of distractors tried; many of them find no room.
      padding: width of the blocked edges.
      seed_distance: distance between the beginnings of the two targets. The first one begins at
        least twice as far from the edges.
      marker_radius: radius of the two discs.
      dash_length: length of a dash.
      dash_thickness: thickness of a dash.
      margins: widths to keep clear around dashes; each image uses one of them.
      continuity: how straight contours are.
      target_contrast: brightness of targets, relative to the discs.
      distractor_contrast: brightness of distractors, relative to the discs.
    """

    size: int
    target_dashes: int
    distractor_dashes: int
    num_distractors: int
    padding: int
    seed_distance: int
    marker_radius: float
    dash_length: int
    dash_thickness: float
    margins: tuple[int, ...]
    continuity: float
    target_contrast: float
    distractor_contrast: float


_BY_SIZE = {  # one value for each of SIZES
    "padding": (1, 1, 1, 22),
    "seed_distance": (7, 12, 20, 27),
    "marker_radius": (1.5, 2.5, 3.0, 5.0),
    "dash_length": (2, 5, 5, 5),
    "dash_thickness": (0.5, 1.0, 1.5, 2.0),
    "margins": ((1,), (1,), (2, 3), (3,)),
    "continuity": (1.0, 1.8, 1.8, 1.8),
    "target_contrast": (1.5, 0.8, 0.9, 1.0),
    "distractor_contrast": (2.0, 0.8, 0.9, 1.0),
}
_ALL_DISTRACTOR_DASHES = (20, 22, 35, 30)


def settings(size: int, difficulty: str) -> Settings:
    """Returns the benchmark's settings, or for "short" the same with fewer dashes.

    Args:
      size: one of SIZES.
      difficulty: one of DIFFICULTIES.

    Raises:
      UserError: for any other size or difficulty.
    """
    if size not in SIZES:
        raise UserError(f"no Pathfinder of size {size}; sizes are {', '.join(map(str, SIZES))}")
    if difficulty not in DIFFICULTIES:
        raise UserError(
            f"no Pathfinder difficulty {difficulty!r}; there are {', '.join(DIFFICULTIES)}"
        )
    column = SIZES.index(size)
    distractor_dashes = DIFFICULTIES[difficulty] // 3
    return Settings(
        size=size,
        target_dashes=DIFFICULTIES[difficulty],
        distractor_dashes=distractor_dashes,
        num_distractors=_ALL_DISTRACTOR_DASHES[column] // distractor_dashes,
        **{name: values[column] for name, values in _BY_SIZE.items()},
    )
