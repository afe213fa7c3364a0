"""Task: a data set, how a model reads it, and the accuracies of trivial classifiers."""

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
DOCUMENT_LENGTH = 4_000  # bytes that the benchmark reads of each document

LoadStored = Callable[[str], Examples]  # loads a split of the prepared data set by name


def as_stored(load: LoadStored, split: str) -> Examples:
    """Returns a split as it is stored."""
    return load(split)


def cut_documents(load: LoadStored, split: str, length: int) -> Examples:
    """Returns a split with each document cut to its first length bytes."""
    return load(split).cut(length)


def shrink_images(load: LoadStored, split: str, shrink: int) -> Examples:
    """Returns a split of images, downsampled by the factor shrink."""
    return load(split).shrunk(shrink)


def no_extra_floors(examples: Examples) -> dict[str, float]:
    """Returns no accuracies: the commonest label is the only trivial classifier."""
    del examples
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
      name: the task's name, as config.task and --task give it.
      builder: class of the TFDS builder of the data set.
      config: config of the builder for generated data, or for published data if the task has no
        generated data.
      source_config: config of the builder for published files; None if there are none.
      max_length: largest number of tokens of a document.
      tokenizer: maps stored values to token ids.
      options: the options of load and their defaults; in a config, option NAME is data.NAME.
      make_split: makes a split. It is called with a function that loads a stored split by name,
        the name of the wanted split, and the options as keyword arguments.
      extra_floors: computes the accuracies, by name, of trivial classifiers besides the commonest
        label.
      definition: for a task of the user's own, the arguments from which make_task of
        skyformer_jax.data.own made it; None for a task of this package.
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
        """Number of token ids, including that of padding."""
        return self.tokenizer.vocab_size

    @property
    def num_classes(self) -> int:
        """Number of different labels."""
        return self.builder.NUM_CLASSES

    @property
    def num_documents(self) -> int:
        """Number of documents of each example, 1 or 2."""
        return self.builder.NUM_DOCUMENTS

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of data that this task has, one or both of KINDS."""
        if self.source_config is None:
            return ("generated",)
        return KINDS if self.config != self.source_config else ("published",)

    def data_set(self, data_dir: str, *, source: str | None = None, kind: str = "") -> LraBuilder:
        """Returns the TFDS builder of the task's data, prepared or not.

        Args:
          data_dir: folder of all data sets.
          source: folder or archive with the published files, or None.
          kind: "generated" or "published"; "" chooses one as settled_kind does.

        Raises:
          UserError: as settled_kind.
        """
        return self._make(self.settled_kind(data_dir, source=source, kind=kind), data_dir)

    def _make(self, kind: str, data_dir: str) -> LraBuilder:
        config = self.source_config if kind == "published" else self.config
        return store.make(self.builder, config, data_dir)

    def first_kind(self, source: str | None) -> str:
        """Returns the kind that is read if data_dir does not hold any yet."""
        return self.kinds[-1] if source else self.kinds[0]

    def settled_kind(self, data_dir: str, *, source: str | None = None, kind: str = "") -> str:
        """Decides whether generated or published examples are read.

        If the task has both kinds, neither kind nor source is given, and data_dir holds published
        examples, prints a line that says which ones are read.

        Args:
          data_dir: folder of all data sets.
          source: folder or archive with the published files, or None.
          kind: one of kinds; "" means the published one if a source is given, else the one that is
            prepared in data_dir, else the generated one. If both are prepared, the generated one is
            read; if the task has only one kind, that one is.

        Raises:
          UserError: if the task has no such kind, or a source is given for generated examples.
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
        """Returns True if data_dir holds the task's data set of this kind."""
        return Path(self._make(kind, data_dir).data_dir).is_dir()

    def longest(self, options: Mapping[str, Any]) -> int:
        """Returns the largest number of tokens of a document, given these options of load."""
        return min(self.max_length, options.get("length", self.max_length)) // (
            options.get("shrink", 1) ** 2
        )

    def is_in(self, source: str) -> bool:
        """Returns True if source holds published files of the task, complete or not."""
        if self.source_config is None:
            return False
        data_set = store.make(self.builder, self.source_config, source)
        data_set.source = expand(source)
        try:
            data_set.source_files()
        except archives.NotHereError:
            return False
        except UserError:  # the files are there but faulty: load reports the fault
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
        """Loads a split, preparing the data set first if it is missing.

        Args:
          split: "train", "validation" or "test".
          data_dir: folder of all data sets.
          source: folder or archive with the published files; None reads what is prepared in
            data_dir, or else generates or downloads the data.
          kind: "generated" or "published"; "" chooses one as settled_kind does.
          **options: options of the task, such as length; see the attribute options, which has the
            defaults.

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
        """Computes the accuracies, in 0..1, of trivial classifiers fitted to these examples."""
        counts = np.bincount(examples.label)
        commonest = {"commonest label": float(counts.max() / len(examples))}
        return commonest | self.extra_floors(examples)
