"""Flags that the benchmarks share.

A script defines the ones that it has, as in OUT = common_flags.out("results/speed_cpu.json").
"""

import os
from typing import Any

import jax
from absl import flags

from skyformer_jax.errors import UserError

flags.disclaim_key_flags()  # --help lists them under the script that defines them


def out(default: str) -> flags.FlagHolder:
    """Defines --out."""
    return flags.DEFINE_string("out", default, "JSON to write; a picture gets the suffix .png.")


def rounds(default: int) -> flags.FlagHolder:
    """Defines --rounds."""
    return flags.DEFINE_integer("rounds", default, "Turns that each program takes.", lower_bound=1)


def small() -> flags.FlagHolder:
    """Defines --small, which the result records as "small"."""
    return flags.DEFINE_bool(
        "small", False, "Use the reduced setting described above, for a CPU or a test."
    )


def set_defaults(**defaults: Any) -> None:
    """Changes the defaults of flags, for --small."""
    for name, value in defaults.items():
        flags.FLAGS.set_default(name, value)


def fake_devices() -> flags.FlagHolder:
    """Defines --fake_devices."""
    return flags.DEFINE_integer("fake_devices", 8, "Devices of a CPU; 0: the real devices.")


def use_fake_devices(flag: flags.FlagHolder) -> None:
    """Splits the CPU into that many devices; must run before jax first asks for its devices."""
    if flag.value:
        # With fewer threads than devices, the collectives can deadlock.
        os.environ.setdefault("NPROC", "16")
        jax.config.update("jax_num_cpu_devices", flag.value)


def integers(flag: flags.FlagHolder, greatest: float = float("inf")) -> list[int]:
    """Returns the positive integers of a list flag in ascending order.

    Raises:
      UserError: if a value is not an integer from 1 to `greatest`, or if there is none.
    """
    try:
        values = sorted({int(value) for value in flag.value})
    except ValueError:
        values = []
    if not values or values[0] < 1 or values[-1] > greatest:
        limit = f" of at most {greatest:,}" if greatest < float("inf") else ""
        given = ",".join(map(str, flag.value))
        raise UserError(f"--{flag.name} must be positive integers{limit}; got {given}")
    return values
