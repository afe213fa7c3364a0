"""Retrieval: does one paper cite the other? AAN pairs (Radev et al., 2013; Tay et al., 2020).

The files of the Long Range Arena are new_aan_pairs.{train,eval,test}.tsv. A line is a label, two
ids and two texts, separated by tabs, without header or quoting. The files hold gigabytes, so they
are read as a stream. Texts are bytes, as the models read them; nothing is decoded.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from skyformer_jax.data import archives, hub
from skyformer_jax.data.archives import is_utf8
from skyformer_jax.data.builder import Documents, LraBuilder, Shard
from skyformer_jax.data.splits import SPLITS
from skyformer_jax.data.task import DOCUMENT_LENGTH, Task, cut_documents
from skyformer_jax.data.tokenizer import BYTES
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say, track

SIZES: Mapping[str, int] = {"train": 147_086, "validation": 18_090, "test": 17_437}

_FOLDERS = ("tsv_data", "aan", "data/aan")
_FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
# The release itself is no longer available: its address answers 403.
HUB = hub.DataSet("OpenNLPLab/lra", "6cb133c44f406da743661488df9e977b87d98775", "data/aan")
_LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}
_NUM_COLUMNS = 5


def find_files(source: Path) -> dict[str, Path]:
    """Finds the published files of the splits "train", "validation" and "test".

    Args:
      source: the folder of the three files, or one that holds tsv_data/, aan/, data/aan/
        or lra_release/.

    Raises:
      UserError: if one of them is missing.
    """
    return archives.find_files(source, _FOLDERS, _FILES)


def read_pairs(
    path: Path, size: int, *, report: Callable[[str], None]
) -> Iterator[tuple[bytes, bytes, int]]:
    """Reads a file line by line, so that memory does not grow with the file.

    Args:
      path: the file, new_aan_pairs.{train,eval,test}.tsv.
      size: number of pairs that the file must have.
      report: called at the end with a line of text if some pairs are not UTF-8.

    Yields:
      First text, second text, and label: 1 if one paper cites the other, else 0.

    Raises:
      UserError: if a line has another number of columns, an unknown label or an empty text, naming
        file and line; and at the end, if there are more or fewer pairs than size.
    """
    count = foreign = 0
    with path.open("rb") as lines:
        for count, line in enumerate(lines, start=1):
            if count == 1:
                line = line.removeprefix(archives.BYTE_ORDER_MARK)
            columns = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if len(columns) != _NUM_COLUMNS:
                raise UserError(
                    f"{path}:{count}: expected {_NUM_COLUMNS} columns, got {len(columns)}; "
                    "is the file complete?"
                )
            label, _, _, first, second = columns
            if label not in _LABELS:
                raise UserError(f"{path}:{count}: the label {_shown(label)} is not 0 or 1")
            if not first or not second:
                raise UserError(f"{path}:{count}: a text is empty; is the file complete?")
            foreign += not (is_utf8(first) and is_utf8(second))
            yield first, second, _LABELS[label]
    archives.check_count(path, count, size, "pairs")
    if foreign:
        report(f"{path}: {foreign:,} of {count:,} pairs are not UTF-8; their bytes are kept")


def _shown(label: bytes) -> str:
    """Shortens a malformed label, which may be as long as a whole text, for an error."""
    return repr(label[:20])[1:]


@dataclasses.dataclass
class RetrievalConfig(tfds.core.BuilderConfig):
    """A data set of pairs of documents.

    Attributes:
      sizes: number of pairs in train, validation and test.
      length: number of bytes kept of each document.
    """

    sizes: tuple[int, int, int] = tuple(SIZES.values())
    length: int = DOCUMENT_LENGTH


class Retrieval(LraBuilder):
    """AAN: two papers as bytes; label 1 if one cites the other."""

    DESCRIPTION = (
        "Pairs of papers' texts as bytes, the first 4,000 of each; 1 if one cites the other."
    )
    CITATION = "Radev et al., The ACL Anthology Network Corpus, 2013"
    NUM_CLASSES = 2
    NUM_DOCUMENTS = 2
    BUILDER_CONFIGS = (
        RetrievalConfig(name="aan", description="The files new_aan_pairs.{train,eval,test}.tsv."),
    )
    _PAIRS_A_FILE = 10_000  # few, because the memory of TFDS's writer grows with its file

    def source_files(self) -> list[Path]:
        """Returns the three published files."""
        return list(find_files(self.source).values())

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Reads the published files as streams, from the source or after downloading them."""
        del dl_manager
        config = self.builder_config
        paths = find_files(self.source) if self.source else self._download()

        def pairs(split: str, size: int) -> Iterator[tuple[Documents, int]]:
            read = read_pairs(paths[split], size, report=self.report)
            for *documents, label in track(read, size, paths[split].name, "pairs"):
                yield tuple(np.frombuffer(d[: config.length], np.uint8) for d in documents), label

        shards = {}
        for split, size in zip(SPLITS, config.sizes, strict=True):
            # TFDS writes the files one after another, so one stream can serve them all. The last
            # file takes the rest of the stream, so that a wrong number of pairs is noticed.
            stream = pairs(split, size)
            shards[split] = [
                functools.partial(itertools.islice, stream, self._PAIRS_A_FILE)
                for _ in range((size - 1) // self._PAIRS_A_FILE)
            ]
            shards[split].append(functools.partial(iter, stream))
        return shards

    def _download(self) -> dict[str, Path]:
        """Finds the published files in the folder of all data sets, or else downloads them."""
        root = Path(self.data_dir_root)
        folder = root / "downloads" / "tsv_data"
        for place in (root, folder):
            try:
                found = find_files(place)
            except archives.NotHereError:
                continue
            say(f"reading {found['train'].parent}")
            return found
        documents = sum(self.builder_config.sizes) * self.NUM_DOCUMENTS
        hub.download(
            HUB,
            _FILES.values(),
            folder,
            extra_bytes=documents * self.builder_config.length,
            instead="name the folder of new_aan_pairs.{train,eval,test}.tsv as the source",
        )
        return find_files(folder)


RETRIEVAL = Task(
    name="retrieval",
    builder=Retrieval,
    config="aan",
    source_config="aan",
    max_length=DOCUMENT_LENGTH,
    tokenizer=BYTES,
    options={"length": DOCUMENT_LENGTH},
    make_split=cut_documents,
)
