"""Trains what a config describes, or goes on with an interrupted run.

python train.py --config=configs/listops.py:skyformer [--config.train.batch_size=16] [--workdir=DIR]
"""

from pathlib import Path

from skyformer_jax.errors import UserError, lra_imports

with lra_imports():
    from absl import flags
    from ml_collections import config_flags

    from skyformer_jax import cli, training

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, as configs/listops.py:ATTENTION[,VARIANT].", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/<config file>-<attention>[-<variant>]."
)
flags.mark_flag_as_required("config")


def _default_workdir() -> Path:
    """runs/<config file>-<attention>[-<variant>], by what the command line says."""
    path, _, argument = _config_path().partition(":")
    parts = [Path(path).stem, _CONFIG.value.attention.name, *argument.split(",")[1:]]
    return Path("runs") / "-".join(part for part in parts if part)


def _config_path() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"])


def main() -> None:
    """Trains, evaluates the best checkpoint on the test split, and prints where things are."""
    if not Path(_config_path().partition(":")[0]).is_file():
        raise UserError(f"--config={_config_path()}: no such file; see configs/")
    training.train(_CONFIG.value, _WORKDIR.value or _default_workdir())


if __name__ == "__main__":
    cli.run(main)
