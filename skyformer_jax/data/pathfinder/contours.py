"""Contours of dashes: targets, many of which are tried at once, and distractors."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from skyformer_jax.data.pathfinder.dashes import DEGREES, Dashes, free_positions, translate

_TARGETS_AT_ONCE = 256  # pairs of targets; another number would change what a seed gives
_TRIES_PER_DASH = 3
_TRIES_PER_DISTRACTOR = 5
_LEAST_WEIGHT = 1e-4  # a contour is given up if the weights of free candidates sum to less
_LEAST_FREE = 0.01  # no distractor is begun if a smaller share of the image is free
_BLOCKED = 77  # mask value (0.3 in the original) from which first dashes are blocked


class Fields(NamedTuple):
    """What dashes block in several images.

    Attributes:
      mask: uint8 [images, side, side], what the dashes block.
      halo: uint8 [images, side, side], the mask dilated by a disc of the margin.
      mask_windows: uint8 [images, rows, columns, width, width], views of mask that are as large as
        its stamps, indexed by the row and the column of their corner.
      halo_windows: the same for halo.
    """

    mask: np.ndarray
    halo: np.ndarray
    mask_windows: np.ndarray
    halo_windows: np.ndarray


class Contours(NamedTuple):
    """One contour in each of several images, perhaps with only its first dashes so far.

    Attributes:
      kinds: int [images, dashes], kinds of its dashes.
      positions: int [images, dashes, 2], centres of their stamps: the tip of the contour for the
        first dash, its far end for any other.
      pivots: int [images, 2], pivot of the last dash.
    """

    kinds: np.ndarray
    positions: np.ndarray
    pivots: np.ndarray


def _start(
    dashes: Dashes, kinds: np.ndarray, positions: np.ndarray, num_dashes: int
) -> tuple[Contours, np.ndarray]:
    """Begins contours with their first dashes.

    Args:
      dashes: all kinds of dashes.
      kinds: int [images], kinds of the first dashes.
      positions: int [images, 2], where the first dashes begin.
      num_dashes: number of dashes that the contours will have.

    Returns:
      contours: the contours, whose pivots lie a margin behind the first dashes.
      ends: int [images, 2], where the first dashes end.
    """
    length, images = dashes.settings.dash_length, len(kinds)
    ends = translate(positions, dashes.ahead[kinds], length)
    pivots = translate(ends, dashes.back[kinds], length + dashes.margin)
    contours = Contours(
        np.zeros((images, num_dashes), int), np.zeros((images, num_dashes, 2), int), pivots
    )
    contours.kinds[:, 0], contours.positions[:, 0] = kinds, positions
    return contours, ends


def _make_fields(dashes: Dashes, masks: np.ndarray, halos: np.ndarray) -> Fields:
    """Makes Fields that write to masks and halos, uint8 [images, side, side] each."""
    windows = [
        np.lib.stride_tricks.sliding_window_view(
            fields, stamps.shape[1:], axis=(1, 2), writeable=True
        )
        for fields, stamps in ((masks, dashes.mask), (halos, dashes.halo))
    ]
    return Fields(masks, halos, *windows)


def _block(
    dashes: Dashes, fields: Fields, contours: Contours, number: int, which: np.ndarray
) -> None:
    """Adds to fields what the dash with index number blocks, in the images with indices which."""
    kinds, positions = contours.kinds[which, number], contours.positions[which, number]
    for windows, stamps in (
        (fields.mask_windows, dashes.mask),
        (fields.halo_windows, dashes.halo),
    ):
        there = which, *dashes.corners(positions, stamps)
        windows[there] = np.maximum(windows[there], stamps[kinds])


def _extend(
    dashes: Dashes,
    fields: Fields,
    contours: Contours,
    number: int,
    which: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Adds a dash to contours, and blocks the surroundings of the previous dash.

    Args:
      dashes: all kinds of dashes.
      fields: what is blocked in the images.
      contours: one contour in each image.
      number: index of the new dash in its contour.
      which: int [some], indices of the images whose contours are extended.
      rng: random generator of these images.

    Returns:
      Those of which whose contours could be extended.
    """
    last = contours.kinds[which, number - 1]
    step = dashes.settings.dash_length + 2 * dashes.margin
    pivots = translate(contours.pivots[which], dashes.ahead[last], step)
    pivots_flat = which * dashes.empty[0].size + dashes.flat_index(pivots)
    points = pivots_flat[:, None] + dashes.next_flat[last]
    free = 255 - fields.halo.reshape(-1)[points]
    sums = np.cumsum(dashes.weights[last] * free, axis=1)

    trying = np.flatnonzero(sums[:, -1] >= 255 * _LEAST_WEIGHT)
    chosen = np.full(len(which), -1)
    for _ in range(_TRIES_PER_DASH):
        heights = sums[trying, -1] * rng.random(len(trying))
        way = (sums[trying] <= heights[:, None]).sum(axis=1)
        candidates = dashes.next_candidates[last[trying], way]
        corners = dashes.corners(pivots[trying] + dashes.candidates[candidates], dashes.max_blocked)
        blocked = fields.mask_windows[which[trying], *corners]
        fits = (blocked <= dashes.max_blocked[DEGREES + candidates]).all(axis=(1, 2))
        chosen[trying[fits]] = candidates[fits]
        trying = trying[~fits]
        if not trying.size:
            break

    extended = np.flatnonzero(chosen >= 0)
    which, chosen, pivots = which[extended], chosen[extended], pivots[extended]
    _block(dashes, fields, contours, number - 1, which)
    contours.kinds[which, number] = DEGREES + chosen
    contours.positions[which, number] = pivots + dashes.candidates[chosen]
    contours.pivots[which] = pivots
    return which


class Targets(NamedTuple):
    """The two targets of an image.

    Attributes:
      kinds: int [2, dashes], kinds of their dashes.
      positions: int [2, dashes, 2], as Contours.positions.
      mask: uint8 [side, side], what they block.
      halo: uint8 [side, side], the mask dilated by a disc of the margin.
    """

    kinds: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    halo: np.ndarray


def draw_targets(dashes: Dashes, rng: np.random.Generator) -> Iterator[Targets]:
    """Yields pairs of targets endlessly; tries many pairs at once, and drops those that fail."""
    num_dashes = dashes.settings.target_dashes
    blank = (np.empty((_TARGETS_AT_ONCE, *empty.shape), np.uint8) for empty in dashes.empty)
    fields = _make_fields(dashes, *blank)
    while True:
        choices = rng.integers(len(dashes.first_kinds), size=_TARGETS_AT_ONCE)
        starts = np.where(choices, dashes.first_ends[choices - 1], 0)
        positions = dashes.first_positions[rng.integers(starts, dashes.first_ends[choices])]
        first, _ = _start(dashes, dashes.first_kinds[choices], positions, num_dashes)
        # The second target begins in any direction from the first, even where the first blocks.
        directions = dashes.ahead[rng.integers(DEGREES, size=_TARGETS_AT_ONCE)]
        positions = np.round(positions + dashes.settings.seed_distance * directions).astype(int)
        second, _ = _start(
            dashes, rng.integers(DEGREES, size=_TARGETS_AT_ONCE), positions, num_dashes
        )

        fields.mask[:], fields.halo[:] = dashes.empty
        which = np.arange(_TARGETS_AT_ONCE)
        for number in range(1, num_dashes):
            for contours in (first, second):  # alternately
                which = _extend(dashes, fields, contours, number, which, rng)
        # In the original, the last dash of the first target blocks nothing.
        _block(dashes, fields, second, num_dashes - 1, which)
        for i in which:
            yield Targets(
                np.stack([first.kinds[i], second.kinds[i]]),
                np.stack([first.positions[i], second.positions[i]]),
                fields.mask[i].copy(),
                fields.halo[i].copy(),
            )


def _start_distractor(
    dashes: Dashes, blocked: np.ndarray, rng: np.random.Generator
) -> Contours | None:
    """Begins a contour where the footprint of its first dash is free.

    Args:
      dashes: all kinds of dashes.
      blocked: bool [side, side], pixels that are blocked for first dashes.
      rng: random generator of the image.

    Returns:
      A contour in one image, or None if no try succeeds.
    """
    settings = dashes.settings
    for _ in range(_TRIES_PER_DASH):
        kind = rng.integers(DEGREES)
        free = free_positions(blocked, dashes.footprints[kind], dashes.rim)
        if not free.size:
            return None
        position = np.divmod(free[rng.integers(free.size)], settings.size)
        contours, ends = _start(
            dashes, np.array([kind]), np.array([position]), settings.distractor_dashes
        )
        inside = np.concatenate([ends, contours.pivots])
        if (inside >= 0).all() and (inside < settings.size).all():
            return contours
    return None


def draw_distractors(dashes: Dashes, targets: Targets, rng: np.random.Generator) -> list[Contours]:
    """Draws distractors, and adds what they block to the mask and the halo of targets.

    Args:
      dashes: all kinds of dashes.
      targets: the targets of the image.
      rng: random generator of the image.

    Returns:
      The distractors that found room, each a contour in one image.
    """
    settings = dashes.settings
    image = (slice(dashes.rim, -dashes.rim),) * 2
    fields = _make_fields(dashes, targets.mask[None], targets.halo[None])
    distractors = []
    for _ in range(settings.num_distractors):
        blocked = np.zeros_like(targets.mask, bool)
        blocked[image] = fields.mask[0][image] >= _BLOCKED
        if np.count_nonzero(blocked) > (1 - _LEAST_FREE) * settings.size**2:
            break
        before = fields.mask.copy(), fields.halo.copy()
        for _ in range(_TRIES_PER_DISTRACTOR):
            contours = _start_distractor(dashes, blocked, rng)
            if contours is None:
                continue
            which = np.array([0])
            for number in range(1, settings.distractor_dashes):
                which = _extend(dashes, fields, contours, number, which, rng)
            if which.size:
                _block(dashes, fields, contours, settings.distractor_dashes - 1, which)
                distractors.append(contours)
                break
            fields.mask[:], fields.halo[:] = before
    return distractors
