"""The flags that the benchmarks share.

A script defines those that it has: OUT = common_flags.out("results/speed_cpu.json").
"""

import os
from typing import Any

import jax
from absl import flags

from skyformer_jax.errors import UserError

flags.disclaim_key_flags()  # --help shows them as flags of the script that asks for them


def out(default: str) -> flags.FlagHolder:
    """Defines --out."""
    return flags.DEFINE_string("out", default, "JSON to write; a picture gets the suffix .png.")


def rounds(default: int) -> flags.FlagHolder:
    """Defines --rounds."""
    return flags.DEFINE_integer("rounds", default, "Turns that each program takes.", lower_bound=1)


def small() -> flags.FlagHolder:
    """Defines --small, which the result says as "small"."""
    return flags.DEFINE_bool(
        "small", False, "The reduced setting, for a CPU or a test; the script says which."
    )


def set_defaults(**defaults: Any) -> None:
    """Gives flags other defaults, for --small."""
    for name, value in defaults.items():
        flags.FLAGS.set_default(name, value)


def fake_devices() -> flags.FlagHolder:
    """Defines --fake_devices."""
    return flags.DEFINE_integer("fake_devices", 8, "Devices of a CPU; 0: the real devices.")


def use_fake_devices(flag: flags.FlagHolder) -> None:
    """Makes that many devices of the CPU, before jax first asks for its devices."""
    if flag.value:
        # With fewer threads than devices, their collectives can wait for each other for ever.
        os.environ.setdefault("NPROC", "16")
        jax.config.update("jax_num_cpu_devices", flag.value)


def integers(flag: flags.FlagHolder, greatest: float = float("inf")) -> list[int]:
    """Returns the positive integers of a list flag in rising order.

    Raises:
      UserError: if one is no integer, below 1 or above the greatest, or if there is none.
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
