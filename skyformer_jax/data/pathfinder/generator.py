"""Generates data sets of Pathfinder images, in chunks, on all cores."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from skyformer_jax.data.parallel import ordered_map
from skyformer_jax.data.pathfinder.drawing import draw
from skyformer_jax.data.pathfinder.parameters import settings
from skyformer_jax.errors import UserError

CHUNK = 1000  # images of one random generator; another number would change what a seed gives


def generate_chunk(
    size: int, difficulty: str, seed: int, chunk: int, num_images: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a chunk, or its first images; the same arguments give the same images.

    Args:
      size: one of SIZES.
      difficulty: one of DIFFICULTIES.
      seed: seed of the stream of chunks, not negative.
      chunk: index of the chunk in the stream.
      num_images: number of images; None means all, CHUNK.

    Returns:
      images: uint8 [num_images, size, size].
      labels: uint8 [num_images], 1 if the discs mark the ends of the same target.

    Raises:
      UserError: for an unknown size or difficulty.
    """
    num_images = CHUNK if num_images is None else num_images
    return draw(settings(size, difficulty), (seed, chunk), num_images)


def chunk_sizes(num_images: int) -> list[int]:
    """Returns the sizes of the chunks that make up num_images; the last chunk may be smaller."""
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
    """Yields the chunks that make up num_images, in order, each as generate_chunk returns it.

    Args:
      num_images: number of images in all chunks.
      size: as in generate_chunk.
      difficulty: as in generate_chunk.
      seed: as in generate_chunk.
      which: indices of the wanted chunks; None means all.
      workers: number of processes; None means one for each core, 1 draws in this process.

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
    """Generates images, which depend on the seed but not on workers.

    A smaller num_images gives the first of the images that a larger one gives.

    Args:
      num_images: number of images.
      size: height and width, one of SIZES.
      difficulty: one of DIFFICULTIES.
      seed: seed of the stream of images, not negative.
      workers: number of processes; None means one for each core, 1 draws in this process.
      progress: called after each chunk with the number of new images.

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
