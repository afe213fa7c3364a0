"""Base class of the TFDS builders, which store data sets as array_record, without TensorFlow.

For the data sets of the benchmark, the stored data do not depend on the form of the source: see
held_out for IMDB's reviews and CIFAR-10. Pathfinder images are split by the hashes of their names.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from skyformer_jax.data import archives
from skyformer_jax.progress import say, track

SOURCE_FILE = "source.json"  # says what a data set was made from, and has the notes
_LRA_HOMEPAGE = "https://github.com/google-research/long-range-arena"
_LRA_CITATION = "Tay et al., Long Range Arena, 2020, arXiv 2011.04006"

Documents = tuple[np.ndarray, ...]
# Documents, each uint8 [length], and labels, int [documents].
Rows = tuple[Sequence[np.ndarray], np.ndarray]
# Yields the examples of one file of a data set: documents, each uint8 [length], and a label.
Shard = Callable[[], Iterator[tuple[Documents, int]]]


class LraBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Base class of the builders of the six data sets, and of the user's own.

    Attributes:
      source: folder or archive with the published files; None generates or downloads.
      notes: peculiarities found in the source, one string each.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str] = _LRA_HOMEPAGE
    CITATION: ClassVar[str]
    NUM_CLASSES: ClassVar[int]
    NUM_DOCUMENTS: ClassVar[int] = 1
    # Whether sources with different files, such as a folder and its archive, give the same data.
    FORMS_AGREE: ClassVar[bool] = True

    source: Path | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(
            shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=f"{self.CITATION}; {_LRA_CITATION}" if self.CITATION else "",
            features=tfds.features.FeaturesDict(
                {
                    **{name: tokens for name in document_features(self.NUM_DOCUMENTS)},
                    "label": tfds.features.ClassLabel(num_classes=self.NUM_CLASSES),
                }
            ),
        )

    @functools.cached_property
    def notes(self) -> list[str]:
        """Peculiarities found in the source, one string each."""
        return []

    def report(self, note: str) -> None:
        """Prints a peculiarity of the source, and stores it with the data set."""
        say(f"{self.name}: {note}")
        self.notes.append(note)

    def source_files(self) -> list[Path]:
        """Returns the files by which the source is recognised later; [] if there are very many.

        Raises:
          UserError: if the source does not hold the data set. The message says what it should hold.
        """
        raise NotImplementedError

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Returns, for each split, functions that each yield the examples of one of its files."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """Removes files that only the preparation needed."""

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, *arguments: Any, **options: Any
    ) -> None:
        super()._download_and_prepare(dl_manager, *arguments, **options)
        files = self.source_files() if self.source is not None else []
        record = {
            "source": str(self.source.absolute()) if self.source else "downloaded or generated",
            "files": {path.name: archives.fingerprint(path) for path in files},
            "notes": self.notes,
        }
        # TFDS renames this folder when the data set is complete.
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
    """Returns the names of the features that hold the documents of an example."""
    return ("tokens",) if num_documents == 1 else ("tokens_1", "tokens_2")


def shard_of_rows(values: Sequence[np.ndarray], labels: np.ndarray, what: str) -> Shard:
    """Makes a shard of examples that are in memory and have one document each.

    Args:
      values: the documents, each uint8 [length].
      labels: int [examples].
      what: text of the progress bar.
    """
    return shard_of_documents([(value,) for value in values], labels, what)


def shard_of_documents(examples: Sequence[Documents], labels: np.ndarray, what: str) -> Shard:
    """Does the same as shard_of_rows, for examples with any number of documents."""

    def shard() -> Iterator[tuple[Documents, int]]:
        for documents, label in track(zip(examples, labels, strict=True), len(labels), what):
            yield documents, int(label)

    return shard
