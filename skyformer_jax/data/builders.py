"""The data sets as TFDS builders: stored once as array_record, read without TensorFlow.

What each stores is the same whatever form of the source it was made from: reviews and photographs
are put in the order of their contents' hashes, and Pathfinder images are divided by their names'.
"""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from skyformer_jax.data import (
    archives,
    image,
    listops,
    pathfinder,
    pathfinder_files,
    retrieval,
    sources,
    splits,
    text,
)
from skyformer_jax.errors import UserError
from skyformer_jax.progress import Progress, say, track

SOURCE_FILE = "source.json"  # what a data set was made of, and what was odd in it
SPLITS = ("train", "validation", "test")
DOCUMENT_LENGTH = 4_000  # bytes of a document that the benchmark reads
_LRA_HOMEPAGE = "https://github.com/google-research/long-range-arena"
_LRA_CITATION = "Tay et al., Long Range Arena, 2020, arXiv 2011.04006"

Documents = tuple[np.ndarray, ...]
# Documents, uint8 each, and labels, uint8 [documents].
Rows = tuple[Sequence[np.ndarray], np.ndarray]
# Makes the examples of one file of a data set: documents (uint8 each) and a label.
Shard = Callable[[], Iterator[tuple[Documents, int]]]


class LraBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """What the six have in common.

    Attributes:
      source: the folder or archive with the published files, or None to do without.
      notes: what was found odd in the source, one text each.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str] = _LRA_HOMEPAGE
    CITATION: ClassVar[str]
    NUM_CLASSES: ClassVar[int]
    NUM_DOCUMENTS: ClassVar[int] = 1

    source: Path | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(
            shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=f"{self.CITATION}; {_LRA_CITATION}",
            features=tfds.features.FeaturesDict(
                {
                    **{name: tokens for name in document_features(self.NUM_DOCUMENTS)},
                    "label": tfds.features.ClassLabel(num_classes=self.NUM_CLASSES),
                }
            ),
        )

    @functools.cached_property
    def notes(self) -> list[str]:
        """See the class."""
        return []

    def report(self, note: str) -> None:
        """Says something odd, and keeps it with the data set."""
        say(f"{self.name}: {note}")
        self.notes.append(note)

    def source_files(self) -> list[Path]:
        """The files that the source is recognised by; none for a folder of very many.

        Raises:
          UserError: if the source is not what it should be, saying what that is.
        """
        raise NotImplementedError

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """What makes the files of each split."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """Removes what the preparation needed and the data set does not."""

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, *arguments: Any, **options: Any
    ) -> None:
        super()._download_and_prepare(dl_manager, *arguments, **options)
        files = self.source_files() if self.source is not None else []
        record = {
            "source": str(self.source or "downloaded or generated"),
            "files": {path.name: archives.fingerprint(path) for path in files},
            "notes": self.notes,
        }
        # Into the folder that is not yet named as finished.
        (Path(self.data_dir) / SOURCE_FILE).write_text(json.dumps(record, indent=1) + "\n")

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator]]]:
        return {
            split: [functools.partial(self._encoded, shard) for shard in shards]
            for split, shards in self.shards(dl_manager).items()
        }

    def _encoded(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
        names = document_features(self.NUM_DOCUMENTS)
        for i, (documents, label) in enumerate(shard()):
            yield i, {**dict(zip(names, documents, strict=True)), "label": label}


def document_features(num_documents: int) -> tuple[str, ...]:
    """Names of the features that hold an example's documents."""
    return ("tokens",) if num_documents == 1 else ("tokens_1", "tokens_2")


def _rows(values: Sequence[np.ndarray], labels: np.ndarray, what: str) -> Shard:
    """A shard of one document each that lies in memory."""

    def examples() -> Iterator[tuple[Documents, int]]:
        for value, label in track(zip(values, labels, strict=True), len(labels), what):
            yield (value,), int(label)

    return examples


@dataclasses.dataclass
class ListopsConfig(tfds.core.BuilderConfig):
    """A variety of ListOps.

    Attributes:
      grammar: of the trees generated; None for the published files.
      sizes: examples of train, validation and test, cut from one stream of distinct trees.
      seed: of that stream.
    """

    grammar: listops.Grammar | None = None
    sizes: tuple[int, int, int] = (96_000, 2_000, 2_000)
    seed: int = 0


class Listops(LraBuilder):
    """ListOps: tokens (ids, see listops.SYMBOLS) and the value 0..9 of the expression."""

    VERSION = tfds.core.Version("2.0.0")  # 1.0.0 had another order
    DESCRIPTION = "Nested operations on digits, classified by their value."
    CITATION = (
        "Nangia and Bowman, ListOps: A Diagnostic Dataset for Latent Tree Learning, 2018, "
        "arXiv 1804.06028"
    )
    NUM_CLASSES = 10
    BUILDER_CONFIGS = (
        ListopsConfig(
            name="generated",
            description="Generated by the Long Range Arena's grammar: 500 to 2,000 tokens.",
            grammar=listops.Grammar(),
        ),
        ListopsConfig(
            name="official",
            description="The published files basic_{train,val,test}.tsv.",
        ),
        ListopsConfig(
            name="small",
            description="The same grammar with short, shallow trees, for a CPU.",
            grammar=listops.Grammar(min_length=4, max_length=48, max_depth=4, max_args=5),
            sizes=(50_000, 2_000, 5_000),
        ),
    )

    def source_files(self) -> list[Path]:
        """The three published files."""
        return list(listops.find_files(self.source).values())

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Read, or generated."""
        del dl_manager
        config = self.builder_config
        if config.grammar is None:
            return {
                split: [_rows(*listops.read_tsv(path), path.name)]
                for split, path in listops.find_files(self.source).items()
            }
        progress = Progress(sum(config.sizes), "generating ListOps")
        sequences, labels = listops.generate(
            sum(config.sizes), seed=config.seed, grammar=config.grammar, progress=progress.update
        )
        progress.close()
        ends = np.cumsum(config.sizes)
        return {
            split: [_rows(sequences[end - size : end], labels[end - size : end], split)]
            for split, size, end in zip(SPLITS, config.sizes, ends, strict=True)
        }


@dataclasses.dataclass
class HeldOutConfig(tfds.core.BuilderConfig):
    """A data set that is published as train and test.

    Attributes:
      sizes: published examples of train and test.
      num_validation: of train, held out by the hashes of their contents, equally many a class.
    """

    sizes: tuple[int, int] = (0, 0)
    num_validation: int = 0


class HeldOutBuilder(LraBuilder, skip_registration=True):
    """A data set that is published as train and test, in an archive that can be downloaded.

    Each split is stored in the order of its contents' hashes.
    """

    URL: ClassVar[str]
    PUBLISHED: ClassVar[archives.Published]
    TFDS_NAME: ClassVar[str]

    def read(self, place: Path, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Train and test, from the folder or archive as published."""
        raise NotImplementedError

    def read_prepared(self, folder: Path, split: str, size: int) -> Rows:
        """A split, from a folder in which TFDS prepared its own data set."""
        raise NotImplementedError

    def source_files(self) -> list[Path]:
        """The archive; or the files of the folder, where they are few."""
        if sources.prepared_by_tfds(self.TFDS_NAME, self.source):
            return []
        place = archives.locate(self.source, self.PUBLISHED)
        return [place] if place.is_file() else sorted(place.glob("*.bin"))

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Read from files, from what TFDS prepared, or from the downloaded archive."""
        config = self.builder_config
        sizes = dict(zip(("train", "test"), config.sizes, strict=True))
        prepared = sources.prepared_by_tfds(self.TFDS_NAME, self.source)
        if prepared:
            say(f"reading {prepared}")
            rows = {
                split: self.read_prepared(prepared, split, size) for split, size in sizes.items()
            }
        else:
            place = self.source or sources.download(
                self.URL, self.PUBLISHED, Path(self.data_dir_root), dl_manager
            )
            rows = self.read(place, sizes)
        for split, (values, labels) in rows.items():
            hashes = np.array([splits.content_hash(value) for value in values], np.uint64)
            order = np.lexsort((labels, hashes))
            rows[split] = [values[i] for i in order], labels[order]
        values, labels = rows["train"]
        held_out = splits.hold_out(values, labels, config.num_validation, seed=0)
        for split, chosen in (("train", ~held_out), ("validation", held_out)):
            rows[split] = [values[i] for i in np.flatnonzero(chosen)], labels[chosen]
        return {split: [_rows(*rows[split], f"storing {self.name} {split}")] for split in SPLITS}


class Text(HeldOutBuilder):
    """IMDB reviews: bytes, and 1 for a positive one. Train, and 2,500 held out of it; test."""

    URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
    PUBLISHED = text.PUBLISHED
    TFDS_NAME = "imdb_reviews"
    HOMEPAGE = "https://ai.stanford.edu/~amaas/data/sentiment/"
    DESCRIPTION = "Movie reviews as bytes, classified as negative (0) or positive (1)."
    CITATION = "Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011"
    NUM_CLASSES = 2
    BUILDER_CONFIGS = (
        HeldOutConfig(
            name="imdb",
            description="All 50,000 labelled reviews, whole.",
            sizes=tuple(text.SIZES.values()),
            num_validation=2_500,
        ),
    )

    def read(self, place: Path, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """See the base."""
        reviews = text.read_reviews(place, sizes=sizes, report=self.report)
        return {split: (_as_arrays(texts), labels) for split, (texts, labels) in reviews.items()}

    def read_prepared(self, folder: Path, split: str, size: int) -> Rows:
        """See the base."""
        texts, labels = sources.read_tfds_reviews(folder, split, size)
        return _as_arrays(texts), labels


def _as_arrays(texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(one, np.uint8) for one in texts]


class Image(HeldOutBuilder):
    """CIFAR-10 in gray: 1,024 pixels, row by row, and 10 classes. 5,000 of train held out."""

    URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    PUBLISHED = image.PUBLISHED
    TFDS_NAME = "cifar10"
    DESCRIPTION = "Photographs of 32 x 32 gray pixels (ITU-R 601 luma, 0..255), row by row."
    HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
    CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
    NUM_CLASSES = 10
    BUILDER_CONFIGS = (
        HeldOutConfig(
            name="cifar10",
            description="All 60,000 photographs.",
            sizes=tuple(image.SIZES.values()),
            num_validation=5_000,
        ),
    )

    def read(self, place: Path, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """See the base."""
        photographs = image.read_cifar10(place, sizes=sizes)
        return {split: (image.to_gray(rgb), labels) for split, (rgb, labels) in photographs.items()}

    def read_prepared(self, folder: Path, split: str, size: int) -> Rows:
        """See the base."""
        rgb, labels = sources.read_tfds_photographs(folder, split, size)
        return image.to_gray(rgb), labels


@dataclasses.dataclass
class RetrievalConfig(tfds.core.BuilderConfig):
    """A set of pairs of documents.

    Attributes:
      sizes: pairs of train, validation and test.
      length: bytes kept of each document.
    """

    sizes: tuple[int, int, int] = tuple(retrieval.SIZES.values())
    length: int = DOCUMENT_LENGTH


class Retrieval(LraBuilder):
    """AAN: two papers as bytes, and 1 if one cites the other."""

    DESCRIPTION = (
        "Pairs of papers' texts as bytes, the first 4,000 of each; 1 if one cites the other."
    )
    CITATION = "Radev et al., The ACL Anthology Network Corpus, 2013"
    NUM_CLASSES = 2
    NUM_DOCUMENTS = 2
    BUILDER_CONFIGS = (
        RetrievalConfig(name="aan", description="The files new_aan_pairs.{train,eval,test}.tsv."),
    )
    _PAIRS_A_FILE = 10_000  # the writer's memory grows with its file

    def source_files(self) -> list[Path]:
        """The three published files."""
        return list(retrieval.find_files(self.source).values())

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Streamed, one pair after another."""
        del dl_manager
        if self.source is None:
            raise UserError(
                "Retrieval has no download: unpack lra_release, which holds "
                "tsv_data/new_aan_pairs.{train,eval,test}.tsv, and name its folder as the source"
            )
        config = self.builder_config
        paths = retrieval.find_files(self.source)

        def pairs(split: str, size: int) -> Iterator[tuple[Documents, int]]:
            read = retrieval.read_pairs(paths[split], size, report=self.report)
            for *documents, label in track(read, size, paths[split].name, "pairs"):
                yield tuple(np.frombuffer(d[: config.length], np.uint8) for d in documents), label

        shards = {}
        for split, size in zip(SPLITS, config.sizes, strict=True):
            # The files are written one after another, so one stream can serve them all; the last
            # one takes what is left, so that a wrong number of pairs is noticed.
            stream = pairs(split, size)
            shards[split] = [
                functools.partial(itertools.islice, stream, self._PAIRS_A_FILE)
                for _ in range((size - 1) // self._PAIRS_A_FILE)
            ]
            shards[split].append(functools.partial(iter, stream))
        return shards


@dataclasses.dataclass
class PathfinderConfig(tfds.core.BuilderConfig):
    """A variety of Pathfinder.

    Attributes:
      size: pixels of a side.
      difficulty: by the length of the two contours, see pathfinder.DIFFICULTIES.
      num_images: how many are generated; None for the published files.
      seed: of the generated ones.
    """

    size: int = 32
    difficulty: str = "hard"
    num_images: int | None = 200_000
    seed: int = 0


def pathfinder_config(size: int, difficulty: str, kind: str) -> PathfinderConfig:
    """Kind is "generated", "official" or "small", the first 20,000 of the generated ones."""
    return PathfinderConfig(
        name=f"{kind}_{size}_{difficulty}",
        description=f"{kind} images of {size} x {size} pixels, {difficulty}.",
        size=size,
        difficulty=difficulty,
        num_images={"generated": 200_000, "official": None, "small": 20_000}[kind],
    )


class Pathfinder(LraBuilder):
    """Pathfinder: gray pixels, row by row, and 1 if one contour joins the two discs."""

    DESCRIPTION = "Two dashed contours among others; 1 if the two discs are the ends of one."
    CITATION = (
        "Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent "
        "units, NeurIPS 2018, arXiv 1805.08315"
    )
    NUM_CLASSES = 2
    BUILDER_CONFIGS = tuple(
        itertools.starmap(
            pathfinder_config,
            itertools.product(
                pathfinder.SIZES, pathfinder.DIFFICULTIES, ("generated", "official", "small")
            ),
        )
    )
    _BLOCKS_A_FILE = 25

    def source_files(self) -> list[Path]:
        """The metadata files."""
        config = self.builder_config
        return pathfinder_files.find_metadata(
            self.source, config.size, pathfinder.DIFFICULTIES[config.difficulty]
        )

    @property
    def workplace(self) -> Path:
        """Where blocks of images lie until all are there."""
        config = self.builder_config
        name = f"blocks-{config.name}-{config.seed}-{self.VERSION}"
        return Path(self.data_dir_root) / self.name / name

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Blocks of images, made or read by all cores, then put together."""
        del dl_manager
        self.workplace.mkdir(parents=True, exist_ok=True)
        name = self.builder_config.name
        make_blocks = self._read if self.builder_config.num_images is None else self._generate
        num_blocks = make_blocks()

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
        """Makes the blocks that an interrupted preparation has not made; returns their number."""
        config = self.builder_config
        counts = pathfinder.chunk_sizes(config.num_images)
        missing = [i for i in range(len(counts)) if not self._block_file(i).exists()]
        if len(missing) < len(counts):
            say(f"{len(counts) - len(missing)} of {len(counts)} blocks of images are there already")
        made = pathfinder.chunks(
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
        """Reads the published files; returns the number of blocks."""
        config = self.builder_config
        blocks = pathfinder_files.read_folder(
            self.source,
            config.size,
            pathfinder.DIFFICULTIES[config.difficulty],
            report=self.report,
        )
        num_blocks = len(self.source_files())
        read = track(blocks, num_blocks, f"reading {config.name}", "blocks")
        for block, (names, images, labels) in enumerate(read):
            self._store(block, names, images, labels)
        return num_blocks

    def _block_file(self, block: int) -> Path:
        return self.workplace / f"{block}.npz"

    def _store(
        self, block: int, names: Sequence[str], images: np.ndarray, labels: np.ndarray
    ) -> None:
        """Stores a block's images, divided by the hashes of their names."""
        chosen = np.array([splits.split_by_name(name) for name in names])
        pixels = images.reshape(len(images), -1)
        arrays = {f"{split}_pixels": pixels[chosen == split] for split in SPLITS}
        arrays |= {f"{split}_labels": labels[chosen == split] for split in SPLITS}
        partial = self._block_file(block).with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial.replace(self._block_file(block))

    def clean_up(self) -> None:
        """Removes the blocks."""
        shutil.rmtree(self.workplace, ignore_errors=True)
