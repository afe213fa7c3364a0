"""Flags of the scripts that run over a grid of task x attention x seed."""

from pathlib import Path

from absl import flags

from experiments.paper import grid
from skyformer_jax import attention
from skyformer_jax.errors import UserError

CONFIGS = flags.DEFINE_list("configs", list(grid.TASKS), "Names of files in configs/.")
ATTENTIONS = flags.DEFINE_list("attentions", list(attention.NAMES), "Attentions of the grid.")
SEEDS = flags.DEFINE_list("seeds", "0,1,2", "Seeds of the grid.")
VARIANT = flags.DEFINE_string("variant", "", "Variant of the configs: paper, fast or small.")
SMALL = flags.DEFINE_bool(
    "small", False, "The reduced setting for a CPU: the variant small, still shorter."
)
SET = flags.DEFINE_multi_string(
    "set",
    [],
    "[CONFIG:]FIELD=VALUE, an override for all cells or for those of a config; repeatable.",
)
TOGETHER = flags.DEFINE_bool(
    "together",
    False,
    "Train all seeds of a config and attention in one program, for an accelerator.",
)
DIR = flags.DEFINE_string("dir", "runs/sweep", "Folder with a folder for each cell.")
OUT = flags.DEFINE_string("out", "results/sweep.json", "JSON to write.")


def set_defaults(**defaults: str) -> None:
    """Changes the defaults of flags from those of the sweep, before they are parsed."""
    for name, value in defaults.items():
        flags.FLAGS.set_default(name, value)


def overrides() -> list[str]:
    """Returns all overrides, first those of --small, then those of --set."""
    return (grid.shorter(CONFIGS.value) if SMALL.value else []) + SET.value


def variant() -> str:
    """Returns the variant of the configs.

    Raises:
      UserError: if --small is combined with another variant.
    """
    if SMALL.value and VARIANT.value not in ("", "small"):
        raise UserError(f"--small uses the variant small; leave out --variant={VARIANT.value}")
    return "small" if SMALL.value else VARIANT.value


def make_cells() -> list[grid.Cell]:
    """Returns the cells of the grid that the flags ask for.

    Raises:
      UserError: for the first value that cannot work.
    """
    asked = (CONFIGS.value, ATTENTIONS.value, SEEDS.value)
    return grid.make_grid(*asked, variant(), overrides(), Path(DIR.value), TOGETHER.value)
