"""Makes a released checkpoint from a finished run.

    python -m experiments.release --workdir=runs/text-skyformer --out=checkpoints/text-skyformer

The folder gets parameters.npz (arrays, readable without pickle), config.json and result.json, which
has the test result with the checksum of the data, and how the model was trained.
"""

import jax
from absl import flags

from experiments.records import provenance, provenance_of_run
from skyformer_jax import cli, training
from skyformer_jax.files import expand
from skyformer_jax.training import config as configs
from skyformer_jax.training.logs import read_metrics, training_seconds

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the finished run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to create.", required=True)


def main() -> None:
    """Creates the folder and prints a summary of it."""
    workdir = expand(_WORKDIR.value)
    batch_size = configs.read(workdir / "config.json").train.batch_size
    trained = {
        **(provenance_of_run(workdir) or provenance(jax.device_count())),
        "seconds": round(training_seconds(read_metrics(workdir / "metrics.jsonl"), batch_size)),
    }
    result = training.release(_WORKDIR.value, _OUT.value, trained)
    print(
        f"{_OUT.value}: {result['parameters']:,} parameters of step {result['step']}, "
        f"test accuracy {100 * result['test']['accuracy']:.2f} %"
    )


if __name__ == "__main__":
    cli.run(main)
