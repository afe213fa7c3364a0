"""Draws images from targets, distractors and discs."""

import math
from collections.abc import Iterable

import numpy as np

from skyformer_jax.data.pathfinder.contours import Targets, draw_distractors, draw_targets
from skyformer_jax.data.pathfinder.dashes import FINE, Dashes, make_dashes, shrink
from skyformer_jax.data.pathfinder.parameters import Settings

_LANCZOS_REACH = 3  # reach of the resampling, in pixels


def draw_disc(size: int, radius: float, position: np.ndarray) -> np.ndarray:
    """Draws a disc around a pixel, uint8 [size, size].

    Resamples only those surroundings that affect the result.
    """
    reach = math.ceil(radius) + 2 * _LANCZOS_REACH
    window = [slice(max(x - reach, 0), min(x + reach + 1, size)) for x in position.tolist()]
    y, x = (
        np.arange(FINE * (span.start - centre), FINE * (span.stop - centre))
        for span, centre in zip(window, position.tolist(), strict=True)
    )
    fine = (y[:, None] ** 2 + x**2 <= (FINE * radius) ** 2) * np.uint8(255)
    disc = np.zeros((size, size), np.uint8)
    disc[*window] = shrink(fine, y.size // FINE, x.size // FINE)
    return disc


def _draw_lines(dashes: Dashes, contours: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Draws the dashes of contours, given by kinds and positions, as uint8 [size, size]."""
    layer = np.zeros_like(dashes.empty[0])
    width = dashes.line.shape[1]
    for kinds, positions in contours:
        corners = dashes.corners(positions, dashes.line)
        for stamp, row, col in zip(dashes.line[kinds], *corners, strict=True):
            there = layer[row : row + width, col : col + width]
            np.maximum(there, stamp, out=there)
    return layer[dashes.rim : -dashes.rim, dashes.rim : -dashes.rim]


def _draw_image(
    dashes: Dashes, targets: Targets, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Adds distractors and discs to targets; returns the image, uint8 [size, size], and label."""
    settings = dashes.settings
    distractors = draw_distractors(dashes, targets, rng)
    label, one = rng.integers(2, size=2).tolist()
    other = one if label else 1 - one
    tips = targets.positions[one, 0], targets.positions[other, -1]
    image = np.maximum.reduce(
        [
            np.float32(settings.target_contrast)
            * _draw_lines(dashes, zip(targets.kinds, targets.positions, strict=True)),
            np.float32(settings.distractor_contrast)
            * _draw_lines(dashes, [(x.kinds[0], x.positions[0]) for x in distractors]),
            *(draw_disc(settings.size, settings.marker_radius, tip) for tip in tips),
        ]
    )
    darkest, brightest = image.min(), image.max()
    return ((image - darkest) * (255 / (brightest - darkest)) + 0.5).astype(np.uint8), label


def draw(
    settings: Settings, seed: tuple[int, ...], num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws images one after another in this process.

    A smaller num_images gives the first of the images that a larger one gives.

    Args:
      settings: how to draw; the function settings returns the benchmark's.
      seed: seed of the random generators, integers that are not negative.
      num_images: number of images.

    Returns:
      images: uint8 [num_images, size, size].
      labels: uint8 [num_images], 1 if the discs mark the ends of the same target.
    """
    # Many targets are drawn at once, from random generators of their own, so that an image does not
    # depend on the number of images.
    rng, *target_rngs = (
        np.random.default_rng((*seed, use)) for use in range(1 + len(settings.margins))
    )
    of_margins = [make_dashes(settings, margin) for margin in settings.margins]
    targets = [draw_targets(*pair) for pair in zip(of_margins, target_rngs, strict=True)]
    images = np.empty((num_images, settings.size, settings.size), np.uint8)
    labels = np.empty(num_images, np.uint8)
    for i in range(num_images):
        which = rng.integers(len(of_margins))
        images[i], labels[i] = _draw_image(of_margins[which], next(targets[which]), rng)
    return images, labels
