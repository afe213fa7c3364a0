"""The settings of the sections."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of all sections.

    Attributes:
      deadline: time.monotonic() after which a section starts nothing new.
      small: whether everything is tiny, to try the script.
      runs: CONFIG:ATTENTION[,VARIANT] of the runs to train, in this order.
      num_seeds: models that a run trains at once.
      rates: measured steps per second with num_seeds models, by CONFIG:ATTENTION.
      implementations: the implementation by attention, where it is not the config's.
      later_seconds: seconds that later calls will have for the runs.
      run_dir: folder of the runs.
      data_dir: folder of the prepared data sets.
      source: folder of the published data; "" if there is none.
    """

    deadline: float
    small: bool
    runs: tuple[str, ...]
    num_seeds: int
    rates: Mapping[str, float]
    implementations: Mapping[str, str]
    later_seconds: float
    run_dir: Path
    data_dir: str
    source: str
