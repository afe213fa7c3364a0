"""ListOps as the benchmark has it, and small enough for a CPU."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skyformer_jax.data import builders, listops
from skyformer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ListopsTask:
    """A ListOps classification task.

    Attributes:
      name: of the task.
      variety: the TFDS config that generates it.
      max_length: no sequence is longer.
      vocab_size: token ids, 0 for padding included.
      num_classes: the digits.
    """

    name: str
    variety: str
    max_length: int
    vocab_size: int = listops.VOCAB_SIZE
    num_classes: int = 10

    def load(
        self, split: str, data_dir: str, *, source: str | None = None, brackets: bool = True
    ) -> Sequence[dict[str, Any]]:
        """A split, prepared first if it is missing.

        Args:
          split: "train", "validation" or "test".
          data_dir: folder of all data sets.
          source: folder of the published files, to use those instead of generated ones.
          brackets: False drops the closing brackets, as the published code does.

        Returns:
          A sequence of {"tokens": uint8 array, unpadded, "label": int}.

        Raises:
          UserError: if the data are damaged, or the source is missing or malformed.
        """
        if source and self is not LISTOPS:
            raise UserError(f"task {self.name} is generated; data.source is for {LISTOPS.name}")
        variety = "official" if source else self.variety
        builders.prepare(variety, data_dir, source)
        examples = builders.load(variety, split, data_dir)
        if brackets:
            return examples
        return [
            {"tokens": listops.without_brackets(e["tokens"]), "label": e["label"]} for e in examples
        ]

    def floors(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Accuracies of trivial classifiers on these examples, see listops.floors."""
        first = np.array([example["tokens"][0] for example in examples])
        return listops.floors(first, np.array([example["label"] for example in examples]))


LISTOPS = ListopsTask("listops", "generated", max_length=2000)
LISTOPS_SMALL = ListopsTask("listops_small", "small", max_length=48)
