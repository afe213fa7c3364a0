"""Evaluates a run or a released checkpoint, prints a table and writes eval_<split>.json.

    python eval.py --workdir=runs/text-skyformer-fast --split=validation --checkpoint=latest
    python eval.py --checkpoint_dir=checkpoints/text-skyformer --source=DIR --out=result.json

The result of a run is written into its workdir, or to --out. A read-only workdir can be evaluated
too. The result of a released checkpoint is written only if --out is given. The installed package
provides this script as the command skyformer-eval.
"""

import glob
from pathlib import Path
from typing import Any

from skyformer_jax.errors import UserError, lra_imports

with lra_imports():
    from absl import flags

    from skyformer_jax import cli, training
    from skyformer_jax.training import processes


def _find_workdir(given: str) -> Path:
    """Returns the folder itself, or the only folder with this name and a suffix -<attention>."""
    path = Path(given)
    if path.exists():
        return path
    longer = sorted(p for p in path.parent.glob(f"{glob.escape(path.name)}-*") if p.is_dir())
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise UserError(f"--workdir={given} may mean: {', '.join(map(str, longer))}; name one")
    raise UserError(f"--workdir={given} does not exist; train.py makes it")


def command() -> None:
    """Evaluates, prints the table and writes the result."""
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run; runs/quickstart finds runs/quickstart-skyformer if no other matches.",
    )
    checkpoint_dir = flags.DEFINE_string(
        "checkpoint_dir",
        None,
        "Folder of a released checkpoint, such as those in checkpoints/ (docs/models.md).",
    )
    source = flags.DEFINE_string(
        "source",
        None,
        "For --checkpoint_dir: folder or archive of the published data; default: the data in "
        "--data_dir, else downloaded or generated data.",
    )
    split = flags.DEFINE_string("split", "test", "Split: train, validation or test.")
    checkpoint = flags.DEFINE_string(
        "checkpoint", "best", "Checkpoint: best (by validation accuracy), latest, or a step."
    )
    landmark_draws = flags.DEFINE_integer(
        "landmark_draws", 0, "Additional evaluations with randomly drawn landmarks.", lower_bound=0
    )
    batch_size = flags.DEFINE_integer(
        "batch_size",
        None,
        "Batch size; default: that of training. It does not affect the result.",
        lower_bound=1,
    )
    data_dir = flags.DEFINE_string("data_dir", None, "Folder of the data sets, if it was moved.")
    out = flags.DEFINE_string(
        "out", None, "JSON file or folder for the result; default: the workdir."
    )
    coordinator = flags.DEFINE_string(
        "coordinator", "", "Several processes: auto, or host:port of process 0 (docs/scaling.md)."
    )
    num_processes = flags.DEFINE_integer(
        "num_processes", 0, "Number of processes; 0: read from the environment."
    )
    process_id = flags.DEFINE_integer(
        "process_id", -1, "Index of this process; -1: read from the environment."
    )
    flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint_dir"], required=True)

    def main() -> None:
        processes.start(coordinator.value, num_processes.value, process_id.value)
        options: dict[str, Any] = {
            "split": split.value,
            "landmark_draws": landmark_draws.value,
            "data_dir": data_dir.value,
            "batch_size": batch_size.value,
            "out": out.value,
            "show": lambda result: print(training.result_table(result)),
        }
        if checkpoint_dir.value:
            training.evaluate_released(checkpoint_dir.value, source=source.value, **options)
        else:
            if source.value:
                raise UserError("--source is only for --checkpoint_dir; a run stores its own")
            assert workdir.value is not None  # absl requires one of the two
            training.evaluate(_find_workdir(workdir.value), checkpoint=checkpoint.value, **options)

    cli.run(main, __name__)


if __name__ == "__main__":
    command()
