"""Evaluates, on this machine, a run that the accelerator command trained elsewhere.

    python -m experiments.benchmarks.accelerator.evaluate --run=DIR/text-skyformer \
        --trained=results/accelerator.json --data_dir=data

The run may be unfinished. The best checkpoint of each seed is evaluated on the test split. Its
validation accuracy is computed again and written beside the one that the accelerator recorded, to
compare the same model on two devices. Sequences are padded to --buckets, which saves time and
changes predictions only by rounding. Writes JSON with commit, versions and hardware of the
evaluation, and those of the training from --trained.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.benchmarks import common_flags
from experiments.records import Row, provenance, read_json, write_json
from skyformer_jax import cli, training
from skyformer_jax.errors import UserError

_RUN = flags.DEFINE_string("run", None, "Folder of the run, with the folders of its seeds.")
_TRAINED = flags.DEFINE_string("trained", None, "JSON that the accelerator command wrote.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the prepared data.")
_BUCKETS = flags.DEFINE_list("buckets", ["512", "1024", "2048"], "Lengths to pad to.")
_OUT = common_flags.out("results/accelerator_tests.json")
flags.mark_flags_as_required(["run", "trained"])
_FIELDS = ("accuracy", "interval_95", "loss", "per_class_accuracy", "floors", "config_digest")


def _evaluate(workdir: Path, buckets: list[int]) -> Row:
    """Evaluates one seed; returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        config = read_json(workdir / "config.json")
        config["data"]["buckets"] = buckets
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "checkpoints").symlink_to((workdir / "checkpoints").absolute())
        found: dict[str, Any] = {
            split: training.evaluate(folder, split=split, data_dir=_DATA_DIR.value)
            for split in ("validation", "test")
        }
    return {
        "seed": config["seed"],
        "checkpoint": found["test"]["checkpoint"],
        "recorded_validation": found["test"]["validation"],
        "validation": {field: found["validation"][field] for field in ("accuracy", "loss")},
        "test": {field: found["test"][field] for field in _FIELDS},
        "data": found["test"]["data"],
    }


def main() -> None:
    """Evaluates each seed, and writes the JSON after each."""
    run, path = Path(_RUN.value), Path(_OUT.value)
    for flag in (_RUN, _TRAINED):
        if not Path(flag.value).exists():
            raise UserError(f"--{flag.name}={flag.value} does not exist")
    trained = read_json(Path(_TRAINED.value))
    rows = [row for row in trained.get("training", {}).get("rows", []) if _name(row) == run.name]
    workdirs = sorted(run.glob("seed-*")) or [run]
    if not rows:
        raise UserError(f"--trained={_TRAINED.value} has no run {run.name}")
    result = {
        "what": "runs trained by the accelerator command, evaluated at their best checkpoints",
        **provenance(jax.device_count()),
        "trained": {
            **{field: trained[field] for field in ("commit", "versions", "device")},
            **{field: rows[0][field] for field in ("run", "overrides", "num_steps", "step")},
        },
        "buckets": [int(length) for length in _BUCKETS.value],
        "rows": [],
    }
    for workdir in workdirs:
        result["rows"].append(_evaluate(workdir, result["buckets"]))
        write_json(path, result)
        row = result["rows"][-1]
        test, again, recorded = (
            100 * found["accuracy"]
            for found in (row["test"], row["validation"], row["recorded_validation"])
        )
        print(
            f"seed {row['seed']}, step {row['checkpoint']}: test {test:.2f} %, "
            f"validation {again:.2f} % ({recorded:.2f} % recorded)"
        )


def _name(row: Row) -> str:
    """Name of the folder of a run."""
    return row["run"].replace(":", "-").replace(",", "-")


if __name__ == "__main__":
    cli.run(main)
