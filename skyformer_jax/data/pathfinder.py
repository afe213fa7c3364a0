"""Pathfinder: are two tips the ends of one contour? (Linsley et al., 2018, arXiv 1805.08315).

Two long contours of dashes, the targets, lie among short ones, the distractors. A disc marks where
one target begins, another the end of the same target (label 1) or of the other (label 0).

The generator follows the published one (github.com/drewlinsley/pathfinder) in distribution, with
its oddities, as the benchmark's images came from it. A contour starts with a dash of a random
orientation; each further dash points from a pivot, a margin ahead of the last dash, to a random
point on a circle around it, rather ahead than aside. Every dash blocks its surroundings, a margin
wide; a contour that finds no way on is given up.

A dash has one of a few hundred orientations and whole coordinates, so that all dashes are drawn
once, with what they block, and then copied. Most pairs of targets are given up (at 64 pixels and
"hard", a thousand for each that succeeds), so that many are tried together.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from skyformer_jax.data.parallel import ordered_map
from skyformer_jax.errors import UserError

SIZES = (32, 64, 128, 256)
DIFFICULTIES = {"easy": 6, "intermediate": 9, "hard": 14}  # dashes of a target
CHUNK = 1000  # images drawn by one random generator; part of what a seed means

_FINE = 2  # dashes and discs are drawn on a canvas so many times finer
_DEGREES = 360  # orientations of first dashes, from -180
_TRIED_TOGETHER = 256  # pairs of targets; part of what a seed means, as CHUNK
_TRIES_PER_DASH = 3
_TRIES_PER_DISTRACTOR = 5
_LEAST_WEIGHT = 1e-4  # of all candidates together, below which there is no way on
_NO_WEIGHT = 1e-9  # of a candidate, which is as good as 0
_LEAST_FREE = 0.01  # share of an image below which no more distractors are begun
_LANCZOS_REACH = 3  # of the resampling, in pixels

# Masks hold 0..255 for the original's 0..1.
_BLOCKED = 77  # from here on (0.3) a point is blocked for first dashes
_OVERLAP = 459  # sum (1.8) of the masks of a dash and of the image from which on they overlap


class Settings(NamedTuple):
    """How images of a size and difficulty are drawn; lengths are in pixels.

    Attributes:
      size: height and width.
      target_dashes: dashes of each target.
      distractor_dashes: dashes of a distractor.
      num_distractors: distractors tried; many find no place.
      padding: blocked along the edges.
      seed_distance: between the beginnings of the targets, and half of the distance of the first
        from the edges.
      marker_radius: of the two discs.
      dash_length: of a dash.
      dash_thickness: of a dash.
      margins: widths to keep clear around dashes, of which each image has one.
      continuity: how straight contours are.
      target_contrast: brightness of targets, where the discs' is 1.
      distractor_contrast: brightness of distractors.
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


_BY_SIZE = {  # in the order of SIZES
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
    """The benchmark's settings.

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


class _Tables(NamedTuple):
    """All kinds of dashes: _DEGREES first dashes, then one for each candidate of a circle.

    Stamps are uint8 [kinds, width, width]; at their centre a first dash begins, and a further dash
    ends. Fields are images with a rim all around. There everything is blocked for further dashes,
    where the original looks no further than the image; as the image's own edge is blocked, that
    comes to the same.

    Attributes:
      drawn: settings of the images.
      margin: of the image.
      rim: width.
      ahead: float [kinds, 2], sine and cosine of the direction of growth (rows, columns).
      back: float [kinds, 2], of the opposite.
      line: stamps of the dashes themselves.
      mask: stamps of what they block.
      room: stamps of the most that may be blocked already.
      halo: stamps of mask dilated by a disc of the margin.
      candidates: int [candidates, 2], offsets of a circle from its pivot.
      ways: int [kinds, ways], which candidates continue each kind.
      ways_flat: int [kinds, ways], their offsets as flat indices.
      weights: float [kinds, ways], of them.
      footprints: for each first dash, the offsets, flat indices, that must not be blocked.
      first_kinds: int [possible], first dashes that the first target may have.
      first_places: int [places, 2], where these may begin, kind by kind.
      first_ends: int [possible], for each of these kinds the end of its first_places.
      empty: mask and halo of an image without dashes, uint8 [side, side] each.
    """

    drawn: Settings
    margin: int
    rim: int
    ahead: np.ndarray
    back: np.ndarray
    line: np.ndarray
    mask: np.ndarray
    room: np.ndarray
    halo: np.ndarray
    candidates: np.ndarray
    ways: np.ndarray
    ways_flat: np.ndarray
    weights: np.ndarray
    footprints: list[list[int]]
    first_kinds: np.ndarray
    first_places: np.ndarray
    first_ends: np.ndarray
    empty: tuple[np.ndarray, np.ndarray]

    def flat_index(self, points: np.ndarray) -> np.ndarray:
        """Index in a flattened field of int [..., 2] points of the image."""
        side = self.empty[0].shape[0]
        return (points[..., 0] + self.rim) * side + points[..., 1] + self.rim

    def corners(self, places: np.ndarray, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns in a field of the corners of stamps centred at int [dashes, 2]."""
        corners = places + (self.rim - stamps.shape[1] // 2)
        return corners[:, 0], corners[:, 1]


class _Fields(NamedTuple):
    """What dashes block in several images.

    Attributes:
      mask: uint8 [images, side, side], of the dashes.
      halo: likewise, the mask dilated by a disc of the margin.
      mask_windows: mask in windows of the width of its stamps, uint8 [images, rows, columns, width,
        width] by the corners of the windows.
      halo_windows: likewise.
    """

    mask: np.ndarray
    halo: np.ndarray
    mask_windows: np.ndarray
    halo_windows: np.ndarray


class _Contours(NamedTuple):
    """One contour in each of several images, of which only the first dashes may be there yet.

    Attributes:
      kinds: int [images, dashes], of the dashes in the tables.
      places: int [images, dashes, 2], where stamps are centred: a first dash at the contour's tip,
        any other at its far end.
      pivots: int [images, 2], the last dash's.
    """

    kinds: np.ndarray
    places: np.ndarray
    pivots: np.ndarray


def _directions(angles: np.ndarray) -> np.ndarray:
    """Sines and cosines, float [angles, 2].

    Not NumPy's: they are rounded differently on different processors, and then dashes as well.
    """
    return np.array([(math.sin(angle), math.cos(angle)) for angle in angles.tolist()])


def _translate(points: np.ndarray, directions: np.ndarray, distance: int) -> np.ndarray:
    """Points at a distance, rounded up only then, as in the original: sin(pi) is not quite 0."""
    return np.ceil(points + distance * directions).astype(int)


def _shrink(fine: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resamples a canvas, uint8, to [height, width]."""
    resized = Image.fromarray(fine).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def _dilate(array: np.ndarray, radius: int) -> np.ndarray:
    """Dilates [..., height, width] by a disc; the result is wider by the radius on each side."""
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
    """A dash that starts at the centre, and what it blocks: uint8 [width, width] each."""
    reach = length + math.ceil(thickness) + margin
    centre = _FINE * reach
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    row, col = _translate(np.array(centre), direction, _FINE * length).tolist()
    line = [(centre, centre), (col, row)]
    ImageDraw.Draw(canvas).line(line, fill=255, width=round(_FINE * thickness))
    fine = np.asarray(canvas)
    grown = _FINE * margin
    blocked = np.ascontiguousarray(_dilate(fine, grown)[grown:-grown, grown:-grown])
    width = 2 * reach + 1
    return _shrink(fine, width, width), _shrink(blocked, width, width)


def _circle(radius: int) -> np.ndarray:
    """Offsets of the pixels of a circle, int [pixels, 2]: points one pixel apart, rounded down."""
    angles = np.arange(0, 360, 360 / (2 * np.pi * radius)) * np.pi / 180
    points = radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return np.unique(np.floor(points).astype(int), axis=0)


def _footprint(mask: np.ndarray, width: int, side: int) -> list[int]:
    """Offsets, from where a first dash would begin, that must not be blocked, as flat indices.

    As in the original they are one off, only what is blocked in full counts, and only within a
    square of the given half width. There, moreover, nothing is free if at some corner of the image
    all offsets lie outside; such dashes have no offsets here. (At 32 pixels only 30 of the 360
    are left, all towards the upper left, and of the 5 distractors at "hard" 1.2 find a place.)
    """
    offsets = np.argwhere(mask == 255) - mask.shape[0] // 2 + 1
    offsets = offsets[(np.abs(offsets) <= width).all(axis=1)]
    inwards = itertools.product((-1, 1), repeat=2)
    if not all((offsets * signs >= 0).all(axis=1).any() for signs in inwards):
        return []
    return (offsets @ (side, 1)).tolist()


def _free_places(blocked: np.ndarray, footprint: list[int], rim: int) -> np.ndarray:
    """Where in the image no offset of a footprint is blocked, as indices row * size + column.

    Args:
      blocked: bool [side, side]; the rim must not be, as only the image counts.
      footprint: flat indices; there is no free place if there are none.
      rim: of blocked.
    """
    side = blocked.shape[0]
    size = side - 2 * rim
    flat = blocked.reshape(-1)
    start = rim * side + rim
    taken = np.full(size * side, not footprint)  # columns of the rim included
    for offset in footprint:
        taken |= flat[start + offset :][: taken.size]
    return np.flatnonzero(~taken.reshape(size, side)[:, :size])


@functools.lru_cache
def _make_tables(drawn: Settings, margin: int) -> _Tables:
    """Draws all dashes."""
    length = drawn.dash_length
    circle = _circle(length + margin)
    onwards = np.array([math.atan2(row, col) for row, col in circle.tolist()])
    angles = np.concatenate([(np.arange(_DEGREES) - 180) * np.pi / 180, onwards])
    ahead = _directions(angles)
    back = _directions(np.where(angles < 0, angles + np.pi, angles - np.pi))
    # Further dashes are drawn from their far end.
    directions = np.concatenate([ahead[:_DEGREES], back[_DEGREES:]])
    pictures = [_draw_dash(x, length, drawn.dash_thickness, margin) for x in directions]
    line, mask = (np.stack(stack) for stack in zip(*pictures, strict=True))

    turn = np.abs(onwards - angles[:, None])
    turn = np.minimum(turn, 2 * np.pi - turn)
    weights = np.cos(np.minimum(drawn.continuity * turn, np.pi / 2)) ** 2
    num_ways = (weights > _NO_WEIGHT).sum(axis=1).max()
    ways = np.sort(np.argsort(-weights, axis=1, kind="stable")[:, :num_ways], axis=1)

    # A pivot may lie a margin and a bit outside, and the pixels of a circle its radius from there.
    rim = length + 3 * margin + 4
    side = drawn.size + 2 * rim
    empty = np.full((2, side, side), 255, np.uint8)
    for field, edge in zip(empty, (drawn.padding, drawn.padding + margin), strict=True):
        field[rim + edge : -rim - edge, rim + edge : -rim - edge] = 0

    footprints = [_footprint(x, length + margin, side) for x in mask[:_DEGREES]]
    edge = 2 * drawn.seed_distance
    blocked = np.zeros((side, side), bool)
    blocked[rim:-rim, rim:-rim] = True
    blocked[rim + edge : -rim - edge, rim + edge : -rim - edge] = False
    places = [_free_places(blocked, footprint, rim) for footprint in footprints]
    num_places = np.array([len(x) for x in places])
    first_kinds = np.flatnonzero(num_places)
    return _Tables(
        drawn=drawn,
        margin=margin,
        rim=rim,
        ahead=ahead,
        back=back,
        line=line,
        mask=mask,
        room=np.minimum(_OVERLAP - 1 - mask.astype(int), 255).astype(np.uint8),
        halo=_dilate(mask, margin),
        candidates=circle,
        ways=ways,
        ways_flat=(circle @ (side, 1))[ways],
        weights=np.take_along_axis(weights, ways, axis=1),
        footprints=footprints,
        first_kinds=first_kinds,
        first_places=np.stack(np.divmod(np.concatenate(places), drawn.size), axis=1),
        first_ends=np.cumsum(num_places[first_kinds]),
        empty=(empty[0], empty[1]),
    )


def _start(
    tables: _Tables, kinds: np.ndarray, places: np.ndarray, num_dashes: int
) -> tuple[_Contours, np.ndarray]:
    """Contours with their first dashes, and where these end.

    Args:
      tables: of the dashes.
      kinds: int [images], of the first dashes.
      places: int [images, 2], where they begin.
      num_dashes: to leave room for.

    Returns:
      The contours, their pivots a margin behind the dashes, and int [images, 2].
    """
    length, images = tables.drawn.dash_length, len(kinds)
    ends = _translate(places, tables.ahead[kinds], length)
    pivots = _translate(ends, tables.back[kinds], length + tables.margin)
    contours = _Contours(
        np.zeros((images, num_dashes), int), np.zeros((images, num_dashes, 2), int), pivots
    )
    contours.kinds[:, 0], contours.places[:, 0] = kinds, places
    return contours, ends


def _make_fields(tables: _Tables, masks: np.ndarray, halos: np.ndarray) -> _Fields:
    """Fields of masks and halos, uint8 [images, side, side] each, which are written to."""
    windows = [
        np.lib.stride_tricks.sliding_window_view(
            fields, stamps.shape[1:], axis=(1, 2), writeable=True
        )
        for fields, stamps in ((masks, tables.mask), (halos, tables.halo))
    ]
    return _Fields(masks, halos, *windows)


def _block(
    tables: _Tables, fields: _Fields, contours: _Contours, number: int, which: np.ndarray
) -> None:
    """Adds what a dash of each contour blocks, by its number, in the images which."""
    kinds, places = contours.kinds[which, number], contours.places[which, number]
    for windows, stamps in (
        (fields.mask_windows, tables.mask),
        (fields.halo_windows, tables.halo),
    ):
        there = which, *tables.corners(places, stamps)
        windows[there] = np.maximum(windows[there], stamps[kinds])


def _extend(
    tables: _Tables,
    fields: _Fields,
    contours: _Contours,
    number: int,
    which: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Adds a dash to contours and blocks the one before.

    Args:
      tables: of the dashes.
      fields: of the images.
      contours: in the images.
      number: of the new dash.
      which: int [some], of the images.
      rng: of them.

    Returns:
      Those of which that had a way on.
    """
    last = contours.kinds[which, number - 1]
    step = tables.drawn.dash_length + 2 * tables.margin
    pivots = _translate(contours.pivots[which], tables.ahead[last], step)
    pivots_flat = which * tables.empty[0].size + tables.flat_index(pivots)
    points = pivots_flat[:, None] + tables.ways_flat[last]
    free = 255 - fields.halo.reshape(-1)[points]
    sums = np.cumsum(tables.weights[last] * free, axis=1)

    trying = np.flatnonzero(sums[:, -1] >= 255 * _LEAST_WEIGHT)
    chosen = np.full(len(which), -1)
    for _ in range(_TRIES_PER_DASH):
        heights = sums[trying, -1] * rng.random(len(trying))
        way = (sums[trying] <= heights[:, None]).sum(axis=1)
        candidates = tables.ways[last[trying], way]
        corners = tables.corners(pivots[trying] + tables.candidates[candidates], tables.room)
        blocked = fields.mask_windows[which[trying], *corners]
        fits = (blocked <= tables.room[_DEGREES + candidates]).all(axis=(1, 2))
        chosen[trying[fits]] = candidates[fits]
        trying = trying[~fits]
        if not trying.size:
            break

    extended = np.flatnonzero(chosen >= 0)
    which, chosen, pivots = which[extended], chosen[extended], pivots[extended]
    _block(tables, fields, contours, number - 1, which)
    contours.kinds[which, number] = _DEGREES + chosen
    contours.places[which, number] = pivots + tables.candidates[chosen]
    contours.pivots[which] = pivots
    return which


class _Targets(NamedTuple):
    """The two targets of an image.

    Attributes:
      kinds: int [2, dashes], of their dashes.
      places: int [2, dashes, 2], as _Contours.places.
      mask: uint8 [side, side], what they block.
      halo: likewise, as _Fields.halo.
    """

    kinds: np.ndarray
    places: np.ndarray
    mask: np.ndarray
    halo: np.ndarray


def _draw_targets(tables: _Tables, rng: np.random.Generator) -> Iterator[_Targets]:
    """Pairs of targets without end: those that succeed of many that are tried together."""
    num_dashes = tables.drawn.target_dashes
    blank = (np.empty((_TRIED_TOGETHER, *empty.shape), np.uint8) for empty in tables.empty)
    fields = _make_fields(tables, *blank)
    while True:
        choices = rng.integers(len(tables.first_kinds), size=_TRIED_TOGETHER)
        starts = np.where(choices, tables.first_ends[choices - 1], 0)
        places = tables.first_places[rng.integers(starts, tables.first_ends[choices])]
        first, _ = _start(tables, tables.first_kinds[choices], places, num_dashes)
        # The second begins anywhere at the distance, whatever the first blocks.
        directions = tables.ahead[rng.integers(_DEGREES, size=_TRIED_TOGETHER)]
        places = np.round(places + tables.drawn.seed_distance * directions).astype(int)
        second, _ = _start(tables, rng.integers(_DEGREES, size=_TRIED_TOGETHER), places, num_dashes)

        fields.mask[:], fields.halo[:] = tables.empty
        which = np.arange(_TRIED_TOGETHER)
        for number in range(1, num_dashes):
            for contours in (first, second):  # by turns
                which = _extend(tables, fields, contours, number, which, rng)
        # The last dash of the first is not blocked in the original.
        _block(tables, fields, second, num_dashes - 1, which)
        for i in which:
            yield _Targets(
                np.stack([first.kinds[i], second.kinds[i]]),
                np.stack([first.places[i], second.places[i]]),
                fields.mask[i].copy(),
                fields.halo[i].copy(),
            )


def _start_distractor(
    tables: _Tables, blocked: np.ndarray, rng: np.random.Generator
) -> _Contours | None:
    """A contour's first dash where its footprint is free; None if there is no such place.

    Args:
      tables: of the dashes.
      blocked: bool [side, side].
      rng: of the image.
    """
    drawn = tables.drawn
    for _ in range(_TRIES_PER_DASH):
        kind = rng.integers(_DEGREES)
        free = _free_places(blocked, tables.footprints[kind], tables.rim)
        if not free.size:
            return None
        place = np.divmod(free[rng.integers(free.size)], drawn.size)
        contours, ends = _start(
            tables, np.array([kind]), np.array([place]), drawn.distractor_dashes
        )
        inside = np.concatenate([ends, contours.pivots])
        if (inside >= 0).all() and (inside < drawn.size).all():
            return contours
    return None


def _draw_distractors(
    tables: _Tables, targets: _Targets, rng: np.random.Generator
) -> list[_Contours]:
    """Those distractors that find a place; what they block is added to that of the targets."""
    drawn = tables.drawn
    image = (slice(tables.rim, -tables.rim),) * 2
    fields = _make_fields(tables, targets.mask[None], targets.halo[None])
    distractors = []
    for _ in range(drawn.num_distractors):
        blocked = np.zeros_like(targets.mask, bool)
        blocked[image] = fields.mask[0][image] >= _BLOCKED
        if np.count_nonzero(blocked) > (1 - _LEAST_FREE) * drawn.size**2:
            break
        before = fields.mask.copy(), fields.halo.copy()
        for _ in range(_TRIES_PER_DISTRACTOR):
            contours = _start_distractor(tables, blocked, rng)
            if contours is None:
                continue
            which = np.array([0])
            for number in range(1, drawn.distractor_dashes):
                which = _extend(tables, fields, contours, number, which, rng)
            if which.size:
                _block(tables, fields, contours, drawn.distractor_dashes - 1, which)
                distractors.append(contours)
                break
            fields.mask[:], fields.halo[:] = before
    return distractors


def _draw_disc(size: int, radius: float, place: np.ndarray) -> np.ndarray:
    """A disc around a pixel, uint8 [size, size].

    Only its surroundings are resampled, as far as that makes no difference.
    """
    reach = math.ceil(radius) + 2 * _LANCZOS_REACH
    window = [slice(max(x - reach, 0), min(x + reach + 1, size)) for x in place.tolist()]
    y, x = (
        np.arange(_FINE * (part.start - centre), _FINE * (part.stop - centre))
        for part, centre in zip(window, place.tolist(), strict=True)
    )
    fine = (y[:, None] ** 2 + x**2 <= (_FINE * radius) ** 2) * np.uint8(255)
    disc = np.zeros((size, size), np.uint8)
    disc[*window] = _shrink(fine, y.size // _FINE, x.size // _FINE)
    return disc


def _draw_lines(tables: _Tables, contours: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The dashes of contours, their kinds and their places, as uint8 [size, size]."""
    layer = np.zeros_like(tables.empty[0])
    width = tables.line.shape[1]
    for kinds, places in contours:
        corners = tables.corners(places, tables.line)
        for stamp, row, col in zip(tables.line[kinds], *corners, strict=True):
            there = layer[row : row + width, col : col + width]
            np.maximum(there, stamp, out=there)
    return layer[tables.rim : -tables.rim, tables.rim : -tables.rim]


def _draw_image(
    tables: _Tables, targets: _Targets, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Adds distractors and discs to targets: the image, uint8 [size, size], and its label."""
    drawn = tables.drawn
    distractors = _draw_distractors(tables, targets, rng)
    label, one = rng.integers(2, size=2).tolist()
    other = one if label else 1 - one
    tips = targets.places[one, 0], targets.places[other, -1]
    image = np.maximum.reduce(
        [
            np.float32(drawn.target_contrast)
            * _draw_lines(tables, zip(targets.kinds, targets.places, strict=True)),
            np.float32(drawn.distractor_contrast)
            * _draw_lines(tables, [(x.kinds[0], x.places[0]) for x in distractors]),
            *(_draw_disc(drawn.size, drawn.marker_radius, tip) for tip in tips),
        ]
    )
    darkest, brightest = image.min(), image.max()
    return ((image - darkest) * (255 / (brightest - darkest)) + 0.5).astype(np.uint8), label


def draw(drawn: Settings, seed: tuple[int, ...], num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws images one after another in this process; fewer are the first of more.

    Args:
      drawn: what to draw; settings() has the benchmark's.
      seed: not negative.
      num_images: how many.

    Returns:
      images: uint8 [num_images, size, size].
      labels: uint8 [num_images], 1 if the discs mark the ends of the same target.
    """
    # Targets come in batches. With random generators of their own, an image does not depend on
    # how many are drawn.
    rng, *target_rngs = (
        np.random.default_rng((*seed, use)) for use in range(1 + len(drawn.margins))
    )
    tables = [_make_tables(drawn, margin) for margin in drawn.margins]
    targets = [_draw_targets(*pair) for pair in zip(tables, target_rngs, strict=True)]
    images = np.empty((num_images, drawn.size, drawn.size), np.uint8)
    labels = np.empty(num_images, np.uint8)
    for i in range(num_images):
        which = rng.integers(len(tables))
        images[i], labels[i] = _draw_image(tables[which], next(targets[which]), rng)
    return images, labels


def generate_chunk(
    size: int, difficulty: str, seed: int, chunk: int, num_images: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a chunk, the same for the same arguments, or its first images.

    Args:
      size: one of SIZES.
      difficulty: one of DIFFICULTIES.
      seed: of the stream of chunks, not negative.
      chunk: index in it.
      num_images: how many of the chunk; None means all of its CHUNK.

    Returns:
      As draw.

    Raises:
      UserError: for an unknown size or difficulty.
    """
    num_images = CHUNK if num_images is None else num_images
    return draw(settings(size, difficulty), (seed, chunk), num_images)


def chunk_sizes(num_images: int) -> list[int]:
    """Images of each of the chunks that make so many images; the last one is cut."""
    return [min(CHUNK, num_images - start) for start in range(0, num_images, CHUNK)]


def chunks(
    num_images: int,
    *,
    size: int,
    difficulty: str,
    seed: int,
    which: Sequence[int] | None = None,
    workers: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the chunks of a stream in order, the last one cut, so many images in all.

    Args:
      num_images: how many.
      size: as generate_chunk.
      difficulty: as generate_chunk.
      seed: as generate_chunk.
      which: indices of the chunks wanted; None means all.
      workers: processes; None means one for each core, 1 draws in this process.

    Raises:
      UserError: for an unknown size or difficulty, or a negative seed.
    """
    settings(size, difficulty)
    if seed < 0:
        raise UserError(f"the seed of Pathfinder must not be negative; got {seed}")
    counts = chunk_sizes(num_images)
    wanted = range(len(counts)) if which is None else which
    arguments = ((size, difficulty, seed, chunk, counts[chunk]) for chunk in wanted)
    yield from ordered_map(generate_chunk, arguments, workers=workers)


def generate(
    num_images: int,
    *,
    size: int = 32,
    difficulty: str = "hard",
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images, the same for the same seed whatever the workers; fewer are the first of more.

    Args:
      num_images: how many.
      size: height and width, one of SIZES.
      difficulty: one of DIFFICULTIES.
      seed: of the stream of images, not negative.
      workers: processes; None means one for each core, 1 draws in this process.
      progress: called with the number of new images, as they come.

    Returns:
      images: uint8 [num_images, size, size].
      labels: uint8 [num_images], 1 if the discs mark the ends of the same target.

    Raises:
      UserError: for an unknown size or difficulty, or a negative seed.
    """
    settings(size, difficulty)
    images = np.empty((num_images, size, size), np.uint8)
    labels = np.empty(num_images, np.uint8)
    done = 0
    for new_images, new_labels in chunks(
        num_images, size=size, difficulty=difficulty, seed=seed, workers=workers
    ):
        new = slice(done, done + len(new_labels))
        images[new], labels[new] = new_images, new_labels
        done = new.stop
        if progress is not None:
            progress(len(new_labels))
    return images, labels
