"""A benchmark task: a data set, how a model reads it, and its trivial accuracies."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skyformer_jax.data import store
from skyformer_jax.data.builder import LraBuilder
from skyformer_jax.data.examples import Examples
from skyformer_jax.data.splits import SPLITS
from skyformer_jax.data.tokenizer import Tokenizer
from skyformer_jax.errors import UserError
from skyformer_jax.files import expand

DOCUMENT_LENGTH = 4_000  # bytes of a document that the benchmark reads

LoadStored = Callable[[str], Examples]  # a split of the prepared data set, by its name


def as_stored(load: LoadStored, split: str) -> Examples:
    """A split as it is stored."""
    return load(split)


def cut_documents(load: LoadStored, split: str, length: int) -> Examples:
    """A split with the first length bytes of each document."""
    return load(split).cut(length)


def shrink_images(load: LoadStored, split: str, shrink: int) -> Examples:
    """A split of images at a resolution that is shrink times lower."""
    return load(split).shrunk(shrink)


def no_extra_floors(examples: Examples) -> dict[str, float]:
    """No trivial classifiers beyond the commonest label."""
    del examples
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
      name: name of the task.
      builder: class of the TFDS builder of its data set.
      config: config of the builder.
      source_config: config of the builder if published files are named; None if there are none.
      max_length: no document is longer.
      tokenizer: maps stored values to token ids.
      options: the options of load, config.data.NAME, and their defaults.
      make_split: makes a split: called with a function that loads a stored split by its name, the
        name of the wanted split, and the options.
      extra_floors: accuracies of trivial classifiers, by name, besides the commonest label.
    """

    name: str
    builder: type[LraBuilder]
    config: str | Any
    source_config: str | Any | None
    max_length: int
    tokenizer: Tokenizer
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    make_split: Callable[..., Examples] = as_stored
    extra_floors: Callable[[Examples], dict[str, float]] = no_extra_floors

    @property
    def vocab_size(self) -> int:
        """Number of token ids, that of padding included."""
        return self.tokenizer.vocab_size

    @property
    def num_classes(self) -> int:
        """Number of different labels."""
        return self.builder.NUM_CLASSES

    @property
    def num_documents(self) -> int:
        """Documents of an example, 1 or 2."""
        return self.builder.NUM_DOCUMENTS

    def data_set(self, data_dir: str, *, source: str | None = None) -> LraBuilder:
        """The TFDS builder of the task's data, prepared or not.

        Args:
          data_dir: folder of all data sets.
          source: folder or archive with the published files, or None.

        Raises:
          UserError: if the task has no published files.
        """
        if source and self.source_config is None:
            raise UserError(f"task {self.name} is generated: it takes no data.source")
        return store.make(self.builder, self.source_config if source else self.config, data_dir)

    def longest(self, options: Mapping[str, Any]) -> int:
        """The most tokens that a document can have, with these options of load."""
        return min(self.max_length, options.get("length", self.max_length)) // (
            options.get("shrink", 1) ** 2
        )

    def is_in(self, source: str) -> bool:
        """Whether the folder or archive holds the published files of the task."""
        if self.source_config is None:
            return False
        data_set = store.make(self.builder, self.source_config, source)
        data_set.source = expand(source)
        try:
            data_set.source_files()
        except UserError:
            return False
        return True

    def load(
        self, split: str, data_dir: str, *, source: str | None = None, **options: Any
    ) -> Examples:
        """A split; the data set is prepared first if it is missing.

        Args:
          split: "train", "validation" or "test".
          data_dir: folder of all data sets.
          source: folder or archive with the published files; None generates, downloads, or takes
            what lies in data_dir.
          **options: see the attribute of that name; those left out have their defaults.

        Raises:
          UserError: if the split or an option is unknown, the source is missing or malformed, or
            the prepared data are damaged.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
        for option in options:
            if option not in self.options:
                known = ", ".join(self.options) or "none"
                raise UserError(f"task {self.name} has no data.{option}; it has: {known}")
        data_set = self.data_set(data_dir, source=source)
        store.prepare(data_set, source)

        def stored(split: str) -> Examples:
            return dataclasses.replace(store.load(data_set, split), tokenizer=self.tokenizer)

        return self.make_split(stored, split, **{**self.options, **options})

    def floors(self, examples: Examples) -> dict[str, float]:
        """Accuracies, in 0..1, of trivial classifiers that are fitted to these very examples."""
        counts = np.bincount(examples.label)
        commonest = {"commonest label": float(counts.max() / len(examples))}
        return commonest | self.extra_floors(examples)
