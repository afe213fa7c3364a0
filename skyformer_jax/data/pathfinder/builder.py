"""The TFDS builder of Pathfinder."""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from skyformer_jax.data.builder import Documents, LraBuilder, Shard
from skyformer_jax.data.pathfinder import generator, reader
from skyformer_jax.data.pathfinder.parameters import DIFFICULTIES, PUBLISHED, SIZES
from skyformer_jax.data.splits import SPLITS, split_by_name
from skyformer_jax.progress import Progress, say, track


@dataclasses.dataclass
class PathfinderConfig(tfds.core.BuilderConfig):
    """A version of Pathfinder.

    Attributes:
      size: height and width in pixels, one of SIZES.
      difficulty: one of DIFFICULTIES.
      num_images: number of generated images; None for the published files.
      seed: seed of the generated images.
    """

    size: int = 32
    difficulty: str = "hard"
    num_images: int | None = 200_000
    seed: int = 0


def pathfinder_config(size: int, difficulty: str, kind: str) -> PathfinderConfig:
    """Makes a config of kind "generated", "official", or "small", the first 20,000 generated."""
    return PathfinderConfig(
        name=f"{kind}_{size}_{difficulty}",
        description=f"{kind} images of {size} x {size} pixels, {difficulty}.",
        size=size,
        difficulty=difficulty,
        num_images={"generated": 200_000, "official": None, "small": 20_000}[kind],
    )


class Pathfinder(LraBuilder):
    """Pathfinder: gray pixels, row by row; label 1 if one contour joins the two discs."""

    DESCRIPTION = "Two dashed contours among others; 1 if the two discs are the ends of one."
    CITATION = (
        "Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent "
        "units, NeurIPS 2018, arXiv 1805.08315"
    )
    NUM_CLASSES = 2
    BUILDER_CONFIGS = tuple(
        pathfinder_config(size, difficulty, kind)
        for size, difficulty, kind in itertools.product(
            SIZES, DIFFICULTIES, ("generated", "official", "small")
        )
        if kind != "official" or difficulty in PUBLISHED
    )
    _BLOCKS_A_FILE = 25

    def source_files(self) -> list[Path]:
        """Returns the metadata files, each of which lists a block of images."""
        config = self.builder_config
        return reader.find_metadata(self.source, config.size, config.difficulty)

    @property
    def blocks_dir(self) -> Path:
        """The folder of the blocks of images, which are kept until the data set is complete."""
        config = self.builder_config
        name = f"blocks-{config.name}-{config.seed}-{self.VERSION}"
        return Path(self.data_dir_root) / self.name / name

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Generates or reads blocks of images on all cores, then joins them."""
        del dl_manager
        self.blocks_dir.mkdir(parents=True, exist_ok=True)
        name = self.builder_config.name
        num_blocks = self._read() if self.builder_config.num_images is None else self._generate()

        progress = Progress(len(SPLITS) * num_blocks, f"storing {name}", "blocks")

        def images(split: str, blocks: Sequence[int]) -> Iterator[tuple[Documents, int]]:
            for block in blocks:
                with np.load(self._block_file(block)) as arrays:
                    pixels, labels = arrays[f"{split}_pixels"], arrays[f"{split}_labels"]
                for row, label in zip(pixels, labels, strict=True):
                    yield (row,), int(label)
                progress.update(1)

        files = [
            range(start, min(start + self._BLOCKS_A_FILE, num_blocks))
            for start in range(0, num_blocks, self._BLOCKS_A_FILE)
        ]
        return {
            split: [functools.partial(images, split, blocks) for blocks in files]
            for split in SPLITS
        }

    def _generate(self) -> int:
        """Generates the blocks that are missing; returns the number of all blocks."""
        config = self.builder_config
        counts = generator.chunk_sizes(config.num_images)
        missing = [i for i in range(len(counts)) if not self._block_file(i).exists()]
        if len(missing) < len(counts):
            say(f"{len(counts) - len(missing)} of {len(counts)} blocks of images are there already")
        made = generator.chunks(
            config.num_images,
            size=config.size,
            difficulty=config.difficulty,
            seed=config.seed,
            which=missing,
        )
        total = sum(counts[i] for i in missing)
        progress = Progress(total, f"drawing {config.name}", "images")
        for block, (images, labels) in zip(missing, made, strict=True):
            names = [f"imgs/{block}/sample_{i}.png" for i in range(len(labels))]
            self._store(block, names, images, labels)
            progress.update(len(images))
        progress.close()
        return len(counts)

    def _read(self) -> int:
        """Reads the blocks of the published files; returns their number."""
        config = self.builder_config
        blocks = reader.read_folder(
            self.source,
            config.size,
            config.difficulty,
            report=self.report,
        )
        num_blocks = len(self.source_files())
        read = track(blocks, num_blocks, f"reading {config.name}", "blocks")
        for block, (names, images, labels) in enumerate(read):
            self._store(block, names, images, labels)
        return num_blocks

    def _block_file(self, block: int) -> Path:
        return self.blocks_dir / f"{block}.npz"

    def _store(
        self, block: int, names: Sequence[str], images: np.ndarray, labels: np.ndarray
    ) -> None:
        """Stores the images of a block, split by the hashes of their names."""
        chosen = np.array([split_by_name(name) for name in names])
        pixels = images.reshape(len(images), -1)
        arrays = {f"{split}_pixels": pixels[chosen == split] for split in SPLITS}
        arrays |= {f"{split}_labels": labels[chosen == split] for split in SPLITS}
        partial = self._block_file(block).with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial.replace(self._block_file(block))

    def clean_up(self) -> None:
        """Removes the blocks."""
        shutil.rmtree(self.blocks_dir, ignore_errors=True)
