"""A benchmark task: a data set, how a model reads it, and its trivial accuracies."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from skyformer_jax.data import archives, store
from skyformer_jax.data.builder import LraBuilder
from skyformer_jax.data.examples import Examples
from skyformer_jax.data.splits import SPLITS
from skyformer_jax.data.tokenizer import Tokenizer
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.files import expand
from skyformer_jax.progress import say

KINDS = ("generated", "published")
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
      config: config of the builder, of the generated data set if there is one.
      source_config: config of the builder for published files; None if there are none.
      max_length: no document is longer.
      tokenizer: maps stored values to token ids.
      options: the options of load, config.data.NAME, and their defaults.
      make_split: makes a split: called with a function that loads a stored split by its name, the
        name of the wanted split, and the options.
      extra_floors: accuracies of trivial classifiers, by name, besides the commonest label.
      definition: what make_task of skyformer_jax.data.own made the user's own task of; None
        for a task of this package.
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
    definition: Mapping[str, Any] | None = None

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

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of KINDS there are of this task."""
        if self.source_config is None:
            return ("generated",)
        return KINDS if self.config != self.source_config else ("published",)

    def data_set(self, data_dir: str, *, source: str | None = None, kind: str = "") -> LraBuilder:
        """The TFDS builder of the task's data, prepared or not.

        Args:
          data_dir: folder of all data sets.
          source: folder or archive with the published files, or None.
          kind: as settled_kind returns it; "" settles it.

        Raises:
          UserError: as settled_kind.
        """
        return self._make(self.settled_kind(data_dir, source=source, kind=kind), data_dir)

    def _make(self, kind: str, data_dir: str) -> LraBuilder:
        config = self.source_config if kind == "published" else self.config
        return store.make(self.builder, config, data_dir)

    def first_kind(self, source: str | None) -> str:
        """The kind that is read if data_dir holds none yet."""
        return self.kinds[-1] if source else self.kinds[0]

    def settled_kind(self, data_dir: str, *, source: str | None = None, kind: str = "") -> str:
        """Which of the kinds is read: generated or published examples.

        Where that is not said, a line says what was chosen if data_dir holds published examples.

        Args:
          data_dir: folder of all data sets.
          source: folder or archive with the published files, or None.
          kind: one of kinds; "" means the published one if a source is named, else what is prepared
            in data_dir, else the generated one.

        Raises:
          UserError: if the task has no such kind, or the source is not for it.
        """
        if source and self.source_config is None:
            raise UserError(f"task {self.name} is generated: it takes no data.source")
        if kind:
            one_of(f"data.kind of task {self.name},", kind, self.kinds)
            if source and kind == "generated":
                raise UserError(
                    f"data.kind=generated of task {self.name} takes no data.source; leave one out"
                )
            return kind
        first = self.first_kind(source)
        if source or len(self.kinds) == 1 or not self.is_prepared("published", data_dir):
            return first
        choose = "--config.data.kind={0} (train.py) or --kind={0} (prepare)"
        if self.is_prepared("generated", data_dir):
            say(
                f"{data_dir} holds generated and published examples of {self.name}: the generated "
                f"ones are read; {choose.format('published')} chooses the others"
            )
            return "generated"
        say(
            f"{data_dir} holds published examples of {self.name}, which are read; "
            f"{choose.format('generated')} generates others"
        )
        return "published"

    def is_prepared(self, kind: str, data_dir: str) -> bool:
        """Whether data_dir holds the data set of that kind."""
        return Path(self._make(kind, data_dir).data_dir).is_dir()

    def longest(self, options: Mapping[str, Any]) -> int:
        """The most tokens that a document can have, with these options of load."""
        return min(self.max_length, options.get("length", self.max_length)) // (
            options.get("shrink", 1) ** 2
        )

    def is_in(self, source: str) -> bool:
        """Whether the folder or archive holds published files of the task, whole or not."""
        if self.source_config is None:
            return False
        data_set = store.make(self.builder, self.source_config, source)
        data_set.source = expand(source)
        try:
            data_set.source_files()
        except archives.NotHereError:
            return False
        except UserError:  # it is there, and load will say what is wrong with it
            pass
        return True

    def load(
        self,
        split: str,
        data_dir: str,
        *,
        source: str | None = None,
        kind: str = "",
        **options: Any,
    ) -> Examples:
        """A split; the data set is prepared first if it is missing.

        Args:
          split: "train", "validation" or "test".
          data_dir: folder of all data sets.
          source: folder or archive with the published files; None takes what is prepared in
            data_dir, or else generates or downloads.
          kind: "generated" or "published"; "" as settled_kind says.
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
        data_set = self.data_set(data_dir, source=source, kind=kind)
        store.prepare(data_set, source)

        def stored(split: str) -> Examples:
            return dataclasses.replace(store.load(data_set, split), tokenizer=self.tokenizer)

        return self.make_split(stored, split, **{**self.options, **options})

    def floors(self, examples: Examples) -> dict[str, float]:
        """Accuracies, in 0..1, of trivial classifiers that are fitted to these very examples."""
        counts = np.bincount(examples.label)
        commonest = {"commonest label": float(counts.max() / len(examples))}
        return commonest | self.extra_floors(examples)
