"""All kinds of dashes, each drawn once together with the area that it blocks."""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from skyformer_jax.data.pathfinder.parameters import Settings

FINE = 2  # dashes and discs are drawn on a canvas that is this many times finer
DEGREES = 360  # number of first dashes, one for each degree from -180

_NO_WEIGHT = 1e-9  # weights of candidates up to this count as 0
# Masks hold 0..255 for the original's 0..1. A dash overlaps others if the sum of its mask and the
# image's mask reaches this value (1.8 in the original) anywhere.
_OVERLAP = 459


class Dashes(NamedTuple):
    """All kinds of dashes: DEGREES first dashes, then one for each candidate of a circle.

    Stamps are uint8 [kinds, width, width]; a first dash begins at the centre of its stamp, any
    other ends there. Fields are uint8 [side, side], images with a rim on all sides. The rim is
    blocked for further dashes. The original looks only inside the image, whose own edge is blocked,
    so the result is the same.

    Attributes:
      settings: settings of the images.
      margin: margin of the images, one of settings.margins.
      rim: width of the rim.
      ahead: float [kinds, 2], sine and cosine of the direction of growth (rows, columns).
      back: float [kinds, 2], sine and cosine of the opposite direction.
      line: stamps of the dashes themselves.
      mask: stamps of what the dashes block.
      max_blocked: stamps of the highest masks of an image that let a dash be added there.
      halo: stamps of mask dilated by a disc of the margin.
      candidates: int [candidates, 2], offsets of the points of a circle from its pivot.
      next_candidates: int [kinds, continuations], which candidates continue each kind.
      next_flat: int [kinds, continuations], offsets of next_candidates in a flattened field.
      weights: float [kinds, continuations], weights of next_candidates.
      footprints: for each first dash, the offsets in a flattened field that must not be blocked.
      first_kinds: int [possible], kinds of the first dashes that the first target may have.
      first_positions: int [positions, 2], where these may begin, grouped by kind.
      first_ends: int [possible], the index in first_positions where the group of each kind ends.
      empty: fields: the mask and the halo of an image without dashes.
    """

    settings: Settings
    margin: int
    rim: int
    ahead: np.ndarray
    back: np.ndarray
    line: np.ndarray
    mask: np.ndarray
    max_blocked: np.ndarray
    halo: np.ndarray
    candidates: np.ndarray
    next_candidates: np.ndarray
    next_flat: np.ndarray
    weights: np.ndarray
    footprints: list[list[int]]
    first_kinds: np.ndarray
    first_positions: np.ndarray
    first_ends: np.ndarray
    empty: tuple[np.ndarray, np.ndarray]

    def flat_index(self, points: np.ndarray) -> np.ndarray:
        """Returns the indices, in a flattened field, of points of the image, int [..., 2]."""
        side = self.empty[0].shape[0]
        return (points[..., 0] + self.rim) * side + points[..., 1] + self.rim

    def corners(self, positions: np.ndarray, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows and columns in a field of corners of stamps centred at int [dashes, 2]."""
        corners = positions + (self.rim - stamps.shape[1] // 2)
        return corners[:, 0], corners[:, 1]


def _directions(angles: np.ndarray) -> np.ndarray:
    """Computes the sines and cosines of angles, float [angles, 2].

    NumPy would round them differently on different processors, and the dashes would differ too.
    """
    return np.array([(math.sin(angle), math.cos(angle)) for angle in angles.tolist()])


def translate(points: np.ndarray, directions: np.ndarray, distance: int) -> np.ndarray:
    """Moves points by a distance and rounds up, as in the original: sin(pi) is not quite 0."""
    return np.ceil(points + distance * directions).astype(int)


def shrink(fine: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resamples a fine canvas, uint8, to [height, width]."""
    resized = Image.fromarray(fine).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def _dilate(array: np.ndarray, radius: int) -> np.ndarray:
    """Dilates [..., height, width] by a disc; the result is larger by the radius on each side."""
    *leading, height, width = array.shape
    out = np.zeros((*leading, height + 2 * radius, width + 2 * radius), array.dtype)
    for row, col in itertools.product(range(-radius, radius + 1), repeat=2):
        if row**2 + col**2 <= radius**2:
            there = out[..., radius + row :, radius + col :][..., :height, :width]
            np.maximum(there, array, out=there)
    return out


def _draw_dash(
    direction: np.ndarray, length: int, thickness: float, margin: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a dash that begins at the centre, and what it blocks: uint8 [width, width] each."""
    reach = length + math.ceil(thickness) + margin
    centre = FINE * reach
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    row, col = translate(np.array(centre), direction, FINE * length).tolist()
    line = [(centre, centre), (col, row)]
    ImageDraw.Draw(canvas).line(line, fill=255, width=round(FINE * thickness))
    fine = np.asarray(canvas)
    grown = FINE * margin
    blocked = np.ascontiguousarray(_dilate(fine, grown)[grown:-grown, grown:-grown])
    width = 2 * reach + 1
    return shrink(fine, width, width), shrink(blocked, width, width)


def _circle(radius: int) -> np.ndarray:
    """Offsets of the pixels of a circle, int [pixels, 2]: points one pixel apart, rounded down."""
    angles = np.arange(0, 360, 360 / (2 * np.pi * radius)) * np.pi / 180
    points = radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return np.unique(np.floor(points).astype(int), axis=0)


def _footprint(mask: np.ndarray, width: int, side: int) -> list[int]:
    """Offsets from the beginning of a first dash that must not be blocked, as flat indices.

    As in the original, the offsets are off by one, and only fully blocked pixels within a square of
    the given half width count. In the original, moreover, no position is free for a dash if all of
    its offsets lie outside the image at some corner; such dashes have no offsets here. (At 32
    pixels, only 30 of the 360 first dashes are left, all towards the upper left, and 1.2 of the 5
    distractors of "hard" find room.)
    """
    offsets = np.argwhere(mask == 255) - mask.shape[0] // 2 + 1
    offsets = offsets[(np.abs(offsets) <= width).all(axis=1)]
    inwards = itertools.product((-1, 1), repeat=2)
    if not all((offsets * signs >= 0).all(axis=1).any() for signs in inwards):
        return []
    return (offsets @ (side, 1)).tolist()


def free_positions(blocked: np.ndarray, footprint: list[int], rim: int) -> np.ndarray:
    """Returns positions in the image where no offset is blocked, as row * size + column.

    Args:
      blocked: bool [side, side]; False on the rim, because only the image counts.
      footprint: offsets as flat indices; if there are none, no position is free.
      rim: width of the rim of blocked.
    """
    side = blocked.shape[0]
    size = side - 2 * rim
    flat = blocked.reshape(-1)
    start = rim * side + rim
    taken = np.full(size * side, not footprint)  # includes the columns of the rim
    for offset in footprint:
        taken |= flat[start + offset :][: taken.size]
    return np.flatnonzero(~taken.reshape(size, side)[:, :size])


@functools.lru_cache
def make_dashes(settings: Settings, margin: int) -> Dashes:
    """Draws all kinds of dashes; the result is cached."""
    length = settings.dash_length
    circle = _circle(length + margin)
    onwards = np.array([math.atan2(row, col) for row, col in circle.tolist()])
    angles = np.concatenate([(np.arange(DEGREES) - 180) * np.pi / 180, onwards])
    ahead = _directions(angles)
    back = _directions(np.where(angles < 0, angles + np.pi, angles - np.pi))
    # All dashes but first ones are drawn from their far end.
    directions = np.concatenate([ahead[:DEGREES], back[DEGREES:]])
    pictures = [_draw_dash(x, length, settings.dash_thickness, margin) for x in directions]
    line, mask = (np.stack(stack) for stack in zip(*pictures, strict=True))

    turn = np.abs(onwards - angles[:, None])
    turn = np.minimum(turn, 2 * np.pi - turn)
    weights = np.cos(np.minimum(settings.continuity * turn, np.pi / 2)) ** 2
    num_next = (weights > _NO_WEIGHT).sum(axis=1).max()
    next_candidates = np.sort(np.argsort(-weights, axis=1, kind="stable")[:, :num_next], axis=1)

    # A pivot may lie slightly more than a margin outside the image, and candidates farther by the
    # radius of the circle.
    rim = length + 3 * margin + 4
    side = settings.size + 2 * rim
    empty = np.full((2, side, side), 255, np.uint8)
    for field, edge in zip(empty, (settings.padding, settings.padding + margin), strict=True):
        field[rim + edge : -rim - edge, rim + edge : -rim - edge] = 0

    footprints = [_footprint(x, length + margin, side) for x in mask[:DEGREES]]
    edge = 2 * settings.seed_distance
    blocked = np.zeros((side, side), bool)
    blocked[rim:-rim, rim:-rim] = True
    blocked[rim + edge : -rim - edge, rim + edge : -rim - edge] = False
    positions = [free_positions(blocked, footprint, rim) for footprint in footprints]
    num_positions = np.array([len(x) for x in positions])
    first_kinds = np.flatnonzero(num_positions)
    return Dashes(
        settings=settings,
        margin=margin,
        rim=rim,
        ahead=ahead,
        back=back,
        line=line,
        mask=mask,
        max_blocked=np.minimum(_OVERLAP - 1 - mask.astype(int), 255).astype(np.uint8),
        halo=_dilate(mask, margin),
        candidates=circle,
        next_candidates=next_candidates,
        next_flat=(circle @ (side, 1))[next_candidates],
        weights=np.take_along_axis(weights, next_candidates, axis=1),
        footprints=footprints,
        first_kinds=first_kinds,
        first_positions=np.stack(np.divmod(np.concatenate(positions), settings.size), axis=1),
        first_ends=np.cumsum(num_positions[first_kinds]),
        empty=(empty[0], empty[1]),
    )
