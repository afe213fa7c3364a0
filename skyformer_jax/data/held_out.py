"""The builder of data sets that are published as train and test: IMDB's reviews and CIFAR-10.

Both are published in several forms, and the stored data are the same for every form, because hashes
of the examples' contents decide which examples are held out of train for validation, and the order
of every split.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from skyformer_jax.data import archives, downloads, tables
from skyformer_jax.data.builder import LraBuilder, Rows, Shard, shard_of_rows
from skyformer_jax.data.splits import SPLITS, content_hash, hold_out
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say


@dataclasses.dataclass
class HeldOutConfig(tfds.core.BuilderConfig):
    """A data set that is published as train and test.

    Attributes:
      sizes: number of published examples of train and of test.
      num_validation: number of examples that are held out of train for validation, by the hashes of
        their contents, the same number from every class.
    """

    sizes: tuple[int, int] = (0, 0)
    num_validation: int = 0


class HeldOutBuilder(LraBuilder, skip_registration=True):
    """A data set that is published as train and test, in an archive that can be downloaded.

    A subclass that sets URL must be in a module of this folder, because TFDS looks for
    checksums.tsv beside it.

    Attributes:
      URL: address of the archive, which is of the first of FORMS.
      FORMS: the folders and archives in which the data set is published.
      TFDS_NAME: name of the data set in TFDS.
      TFDS_FEATURES: names of the features of inputs and of labels in TFDS.
      COLUMNS: names that the columns of inputs and of labels may have in tables.
    """

    URL: ClassVar[str]
    FORMS: ClassVar[tuple[archives.Published, ...]]
    TFDS_NAME: ClassVar[str]
    TFDS_FEATURES: ClassVar[tuple[str, str]]
    COLUMNS: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]

    def read(self, place: Path, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Reads train and test from the published folder or archive."""
        raise NotImplementedError

    def read_examples(self, place: Path, inputs: Sequence, labels: Sequence) -> Rows:
        """Reads a split from the values that TFDS or a table holds; errors name place."""
        raise NotImplementedError

    def source_files(self) -> list[Path]:
        """Returns the archive, the tables, or the files of the folder if they are few.

        Returns [] for a data set that TFDS prepared.
        """
        if downloads.prepared_by_tfds(self.TFDS_NAME, self.source):
            return []
        found = self._tables()
        if found:
            return [path for paths in found.values() for path in paths]
        place = archives.locate(self.source, self.FORMS)
        if place.is_file():
            return [place]
        patterns = [form.files for form in self.FORMS if form.files]
        return sorted({path for pattern in patterns for path in place.glob(pattern)})

    def _tables(self) -> dict[str, list[Path]]:
        """Finds the tables of train and test, if the source holds them and no published form.

        Raises:
          UserError: if there are tables, but not one for train and one for test.
        """
        if archives.find(self.source, self.FORMS) is not None or not self.source.is_dir():
            return {}
        for folder in (self.source, self.source / "plain_text"):  # second: as on the hub
            found = tables.find(folder)
            if {"train", "test"} <= found.keys() and tables.has_columns(
                [*found["train"], *found["test"]], self.COLUMNS
            ):
                return {split: found[split] for split in ("train", "test")}
        for path in sorted(self.source.iterdir()):
            if path.suffix in tables.READERS and tables.has_columns([path], self.COLUMNS):
                raise UserError(
                    f"{path} does not say which of its examples are train and which test, as "
                    f"published; name {self.FORMS[0].folder}/ or its archive, or a folder with "
                    f"train{path.suffix} and test{path.suffix}"
                )
        return {}

    def shards(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Shard]]:
        """Reads what TFDS prepared, tables or published files, or else downloads the archive."""
        config = self.builder_config
        rows = self._rows(dict(zip(("train", "test"), config.sizes, strict=True)), dl_manager)
        for split, (values, labels) in rows.items():
            hashes = np.array([content_hash(value) for value in values], np.uint64)
            order = np.lexsort((labels, hashes))
            rows[split] = [values[i] for i in order], labels[order]
        values, labels = rows["train"]
        held_out = hold_out(values, labels, config.num_validation, seed=0)
        for split, chosen in (("train", ~held_out), ("validation", held_out)):
            rows[split] = [values[i] for i in np.flatnonzero(chosen)], labels[chosen]
        return {
            split: [shard_of_rows(*rows[split], f"storing {self.name} {split}")] for split in SPLITS
        }

    def _rows(
        self, sizes: Mapping[str, int], dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Rows]:
        """Reads the examples of train and test from the first form that is found."""
        prepared = downloads.prepared_by_tfds(self.TFDS_NAME, self.source)
        if prepared:
            say(f"reading {prepared}")
            rows = {}
            for split, size in sizes.items():
                examples = downloads.tfds_examples(prepared, split, size, *self.TFDS_FEATURES)
                rows[split] = self.read_examples(prepared, *zip(*examples, strict=True))
            return rows
        found = self._tables() if self.source else {}
        if found:
            return {
                split: self._read_table(split, paths, sizes[split])
                for split, paths in found.items()
            }
        if self.source is None:
            return self.read(
                downloads.download(self.URL, self.FORMS, Path(self.data_dir_root), dl_manager),
                sizes,
            )
        place = archives.locate(self.source, self.FORMS)
        if place != self.source:
            say(f"reading {place}")
        return self.read(place, sizes)

    def _read_table(self, split: str, paths: Sequence[Path], size: int) -> Rows:
        say(f"reading {', '.join(map(str, paths))}")
        inputs, labels = tables.read(paths, self.COLUMNS)
        archives.check_count(paths[0], len(labels), size, f"examples in {split}")
        return self.read_examples(paths[0], inputs, labels)
