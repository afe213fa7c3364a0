"""Trains the model of a config, or continues an interrupted run.

These commands train Skyformer on Text of the Long Range Arena, in 40 minutes on a CPU core, and
softmax on ListOps in the paper's setting. The runs are written to folders in runs/:

    python train.py --config=configs/text.py:skyformer,fast
    python train.py --config=configs/listops.py:softmax --config.seed=1 --workdir=runs/listops-1

--config.FIELD=VALUE sets any field of the config; skyformer_jax/training/defaults.py lists them.
To continue an interrupted run, start the same command again. The installed package provides this
script as the command skyformer-train.
"""

from pathlib import Path

from skyformer_jax.errors import UserError, lra_imports

with lra_imports():
    import ml_collections
    from absl import flags
    from ml_collections import config_flags

    from skyformer_jax import cli, training


def default_workdir(path: str, argument: str, config: ml_collections.ConfigDict) -> Path:
    """Returns runs/<config file>-<attention>[-<variant>] for the values of the command line."""
    parts = [Path(path).stem, config.attention.name, *argument.split(",")[1:]]
    return Path("runs") / "-".join(part for part in parts if part)


def command() -> None:
    """Trains, evaluates the best checkpoint on the test split, and prints where the files are."""
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, such as configs/listops.py:ATTENTION[,VARIANT].",
        lock_config=True,
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run; default: runs/<config file>-<attention>[-<variant>]."
    )
    flags.mark_flag_as_required("config")

    def main() -> None:
        filename = config_flags.get_config_filename(flags.FLAGS["config"])
        path, _, argument = filename.partition(":")
        if not Path(path).is_file():
            raise UserError(f"--config={filename}: no such file; see configs/")
        folder = workdir.value or default_workdir(path, argument, config.value)
        training.train(config.value, folder)

    cli.run(main, __name__)


if __name__ == "__main__":
    command()
