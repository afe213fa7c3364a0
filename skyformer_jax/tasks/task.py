"""What a benchmark task is, and how its examples are had."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from skyformer_jax.data import builders, store
from skyformer_jax.data.batches import Examples
from skyformer_jax.errors import UserError


def _as_stored(load: Callable[[str], Examples], split: str) -> Examples:
    return load(split)


def _no_more_floors(examples: Examples) -> dict[str, float]:
    del examples
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
      name: of the task.
      builder: of its data set.
      config: of the builder.
      source_config: the builder's config where published files are named; None if there are none.
      max_length: no document is longer.
      vocab_size: token ids, that of padding included.
      shift: token id = stored byte + shift.
      options: what load may be asked for, with its defaults.
      variety: load's last step: makes a split, as the options ask for it, from the stored ones.
      more_floors: accuracies of trivial classifiers beyond that of the commonest label.
    """

    name: str
    builder: type[builders.LraBuilder]
    config: str | Any
    source_config: str | Any | None
    max_length: int
    vocab_size: int
    shift: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variety: Callable[..., Examples] = _as_stored
    more_floors: Callable[[Examples], dict[str, float]] = _no_more_floors

    @property
    def num_classes(self) -> int:
        """Of the labels."""
        return self.builder.NUM_CLASSES

    @property
    def num_documents(self) -> int:
        """Of an example, 1 or 2."""
        return self.builder.NUM_DOCUMENTS

    def data_set(self, data_dir: str, *, source: str | None = None) -> builders.LraBuilder:
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
        """No document is longer, under these options of load."""
        return min(self.max_length, options.get("length", self.max_length)) // (
            options.get("shrink", 1) ** 2
        )

    def is_in(self, source: str) -> bool:
        """Whether the folder or archive holds the task's published files."""
        if self.source_config is None:
            return False
        data_set = store.make(self.builder, self.source_config, source)
        data_set.source = Path(source).expanduser()
        try:
            data_set.source_files()
        except UserError:
            return False
        return True

    def load(
        self, split: str, data_dir: str, *, source: str | None = None, **options: Any
    ) -> Examples:
        """A split, prepared first if it is missing and can be made.

        Args:
          split: "train", "validation" or "test".
          data_dir: folder of all data sets.
          source: folder or archive with the published files; None generates, downloads, or takes
            what lies in data_dir.
          **options: see the attribute; those left out are at their defaults.

        Raises:
          UserError: if the data are damaged, or the source is missing or malformed.
        """
        if split not in builders.SPLITS:
            known = ", ".join(builders.SPLITS)
            raise UserError(f"unknown split {split!r}; choose one of: {known}")
        for option in options:
            if option not in self.options:
                known = ", ".join(self.options) or "none"
                raise UserError(f"task {self.name} has no data.{option}; it has: {known}")
        data_set = self.data_set(data_dir, source=source)
        store.prepare(data_set, source)

        def stored(split: str) -> Examples:
            examples = store.load(data_set, split)
            return dataclasses.replace(examples, shift=self.shift)

        return self.variety(stored, split, **{**self.options, **options})

    def floors(self, examples: Examples) -> dict[str, float]:
        """Accuracies, in 0..1, of trivial classifiers at their best on these very examples."""
        counts = np.bincount(examples.label)
        commonest = {"commonest label": float(counts.max() / len(examples))}
        return commonest | self.more_floors(examples)
