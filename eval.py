"""Evaluates a run, or a released checkpoint: prints a table, writes eval_<split>.json.

python eval.py --workdir=runs/quickstart-skyformer [--split=test] [--checkpoint=best|latest|STEP]
python eval.py --checkpoint_dir=checkpoints/text-skyformer [--source=DIR] [--out=FILE.json]

The file of a run is written into its workdir, that of a released checkpoint where --out says.

A workdir that cannot be written is evaluated all the same; --out=FILE.json writes elsewhere.
"""

import glob
from pathlib import Path

from skyformer_jax.errors import UserError, lra_imports

with lra_imports():
    from absl import flags

    from skyformer_jax import cli, training
    from skyformer_jax.training import processes

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; runs/quickstart will do for runs/quickstart-skyformer."
)
_CHECKPOINT_DIR = flags.DEFINE_string(
    "checkpoint_dir", None, "Folder of a released checkpoint, as in checkpoints/ (docs/models.md)."
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "For --checkpoint_dir: folder or archive of the data as published; default: what --data_dir "
    "holds, else downloaded or generated.",
)
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (by validation), latest, or a step.")
_LANDMARK_DRAWS = flags.DEFINE_integer(
    "landmark_draws", 0, "Evaluations more, with random landmarks.", lower_bound=0
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Default: that of training. Does not change the result.", lower_bound=1
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data lie, if they were moved.")
_OUT = flags.DEFINE_string(
    "out", None, "JSON file, or folder, for the result; default: the workdir."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Several processes: auto, or host:port of process 0 (docs/scaling.md)."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "0: as the environment says.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "-1: as the environment says.")
flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint_dir"], required=True)


def _find_workdir(given: str) -> Path:
    """The folder itself, or the only one that continues its name with -<attention>."""
    path = Path(given)
    if path.exists():
        return path
    longer = sorted(p for p in path.parent.glob(f"{glob.escape(path.name)}-*") if p.is_dir())
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise UserError(f"--workdir={given} may mean: {', '.join(map(str, longer))}; name one")
    raise UserError(f"--workdir={given} does not exist; train.py makes it")


def main() -> None:
    """Evaluates and prints."""
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    options = {
        "split": _SPLIT.value,
        "landmark_draws": _LANDMARK_DRAWS.value,
        "data_dir": _DATA_DIR.value,
        "batch_size": _BATCH_SIZE.value,
        "out": _OUT.value,
        "show": lambda result: print(training.result_table(result)),
    }
    if _CHECKPOINT_DIR.value:
        training.evaluate_released(_CHECKPOINT_DIR.value, source=_SOURCE.value, **options)
    else:
        if _SOURCE.value:
            raise UserError("--source is for --checkpoint_dir; a run knows its data")
        training.evaluate(_find_workdir(_WORKDIR.value), checkpoint=_CHECKPOINT.value, **options)


if __name__ == "__main__":
    cli.run(main)
