"""What the sections are told."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the sections are told.

    Attributes:
      deadline: time.monotonic() after which a section begins nothing more.
      small: tiny in everything.
      runs: CONFIG:ATTENTION[,VARIANT] of the runs to train, in this order.
      num_seeds: models that a run trains at once.
      rates: measured steps per second with num_seeds models, by CONFIG:ATTENTION.
      implementations: by attention, where it is not to be the default.
      later_seconds: time that later calls will have for the runs.
      run_dir: folder of the runs.
      data_dir: where prepared data sets lie or are put.
      source: folder with published data; "" if there is none.
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
