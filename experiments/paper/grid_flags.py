"""The flags of the scripts that go over the grid of task x attention x seed."""

from pathlib import Path

from absl import flags

from experiments.paper import grid
from skyformer_jax import attention
from skyformer_jax.errors import UserError

CONFIGS = flags.DEFINE_list(
    "configs", "listops,text,retrieval,image,pathfinder", "Names of files in configs/."
)
ATTENTIONS = flags.DEFINE_list("attentions", list(attention.NAMES), "Which.")
SEEDS = flags.DEFINE_list("seeds", "0,1,2", "Numbers.")
VARIANT = flags.DEFINE_string("variant", "", "Of the configs: paper, fast or small.")
SMALL = flags.DEFINE_bool(
    "small", False, "The reduced setting for a CPU: the variant small, still shorter."
)
SET = flags.DEFINE_multi_string(
    "set", [], "[CONFIG:]FIELD=VALUE, an override of all cells or of one config's; repeatable."
)
DIR = flags.DEFINE_string("dir", "runs/sweep", "Folder of the cells' folders.")
OUT = flags.DEFINE_string("out", "results/sweep.json", "File to write.")


def set_defaults(**defaults: str) -> None:
    """Gives flags other defaults than the sweep's, before they are parsed."""
    for name, value in defaults.items():
        flags.FLAGS.set_default(name, value)


def overrides() -> list[str]:
    """All overrides, those of --small included, those of --set last."""
    return (grid.shorter(CONFIGS.value) if SMALL.value else []) + SET.value


def variant() -> str:
    """Of the configs; a UserError refuses --small beside another one."""
    if SMALL.value and VARIANT.value not in ("", "small"):
        raise UserError(f"--small is of the variant small; leave out --variant={VARIANT.value}")
    return "small" if SMALL.value else VARIANT.value


def make_cells() -> list[grid.Cell]:
    """The grid that the flags ask for; a UserError is of the first thing that cannot work."""
    asked = (CONFIGS.value, ATTENTIONS.value, SEEDS.value)
    return grid.make_grid(*asked, variant(), overrides(), Path(DIR.value))
