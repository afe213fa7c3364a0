"""The workdir of a run: its folders, its lock, the check for disk space, and its config."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from skyformer_jax import tasks
from skyformer_jax.errors import UserError
from skyformer_jax.files import check_name, lock
from skyformer_jax.training import checkpoints
from skyformer_jax.training import config as configs
from skyformer_jax.training.run import Run
from skyformer_jax.training.state import state_spec

# Prefixes of fields that may change when a run is restarted, and of fields that do not affect
# predictions.
_MAY_CHANGE = (*configs.MUTABLE_FIELDS, "train.num_steps")
NOT_PREDICTING = ("train.", "data.buckets")


class SeedRun(NamedTuple):
    """One model of a run of several seeds: the config for its seed alone, and its folder."""

    config: ml_collections.ConfigDict
    workdir: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.workdir / "checkpoints"


def seed_runs(config: ml_collections.ConfigDict, workdir: Path) -> list[SeedRun]:
    """Returns the models of a run, one for each seed.

    With num_seeds = 1 the model has the config and the workdir of the run. Otherwise the models
    have the folders seed-0, seed-1, ... in the workdir, each as a run of that seed alone would
    write it.
    """
    if config.num_seeds == 1:
        return [SeedRun(config, workdir)]
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        one = config.copy_and_resolve_references()
        one.update({"seed": seed, "num_seeds": 1})
        runs.append(SeedRun(one, workdir / f"seed-{seed}"))
    return runs


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def with_kind(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """Returns a copy of a config with data.kind set to the kind of data that the run reads.

    If neither data.kind nor data.source is given, it is the kind that the checkpoints of the
    workdir were trained on, so that data prepared since then do not change the run. Without
    checkpoints, Task.settled_kind chooses.

    Raises:
      UserError: see Task.settled_kind.
    """
    config = config.copy_and_resolve_references()
    data = config.data
    if not data.kind and not data.source and _has_checkpoints(workdir):
        data.kind = configs.read(workdir / "config.json").data.kind
    task = tasks.of(config)
    data.kind = task.settled_kind(data.dir, source=data.source or None, kind=data.kind)
    return config


def _has_checkpoints(workdir: Path) -> bool:
    """Returns True if the run or one of its seeds has checkpoints."""
    return any(checkpoints.steps(folder / "checkpoints") for folder in _folders(workdir))


def _folders(workdir: Path) -> list[Path]:
    """The folders of a run and of its seeds."""
    return [workdir, *workdir.glob("seed-*")]


@contextlib.contextmanager
def open_workdir(run: Run, workdir: Path) -> Iterator[None]:
    """Creates or checks the workdir and the folders of its seeds, and locks them in its block.

    Raises:
      UserError: if a folder cannot be used, another process trains there, the disk is too full, or
        the folder holds checkpoints of another config.
    """
    runs = seed_runs(run.config, workdir)
    _check_disk(run, workdir, len(runs))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_open_folder(SeedRun(run.config, workdir)))
        for one in runs:
            if one.workdir != workdir:
                stack.enter_context(_open_folder(one))
        yield


def check_visible(workdir: Path) -> None:
    """Raises a UserError on a process that does not see the workdir of the first process."""
    if not (workdir / "config.json").exists():
        raise UserError(
            f"process {jax.process_index()} does not see {workdir}, where process 0 made "
            "config.json: --workdir must be on a disk that all of them share"
        )


def _check_disk(run: Run, workdir: Path, num_models: int) -> None:
    """Raises a UserError unless the checkpoints of the run fit on the disk."""
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_spec(run)))
    # Three checkpoints are kept, one is being written, and one is about to be removed.
    needed = 5 * num_models * state_bytes + (16 << 20)
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of {workdir} has {free / 2**20:,.0f} MiB free; a run of this config "
            f"needs {needed / 2**20:,.0f} MiB: free some space or name another --workdir"
        )


@contextlib.contextmanager
def _open_folder(one: SeedRun) -> Iterator[None]:
    """Locks one folder, and checks its config if it or its seeds have checkpoints."""
    workdir = one.workdir
    check_name(workdir.absolute())
    for parent in (one.checkpoints, workdir, *workdir.parents):
        if parent.is_symlink() and not parent.exists():
            raise UserError(
                f"--workdir={workdir}: {parent} is a link to {parent.readlink()}, which does not "
                "exist; make that folder, or name another"
            )
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--workdir={workdir}: {parent} is a file; name a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(workdir / "lock", wait=False))
        except BlockingIOError:
            raise UserError(f"another process is training in {workdir}") from None
        _bind_config(one)
        yield


def _bind_config(one: SeedRun) -> None:
    """Writes config.json; raises a UserError if the checkpoints are of another config."""
    path = one.workdir / "config.json"
    asked = configs.stored(one.config)
    has_checkpoints = _has_checkpoints(one.workdir)
    if has_checkpoints and not path.exists():
        raise UserError(f"{one.workdir} has checkpoints but no config.json; name another --workdir")
    if has_checkpoints:  # without checkpoints, an earlier config.json does not matter
        saved = configs.to_dict(configs.read(path))
        different = configs.differences(saved, asked, _MAY_CHANGE)
        if different:
            raise UserError(
                f"{one.workdir} holds a run of another config; name another --workdir, or restore: "
                + "; ".join(different)
            )
        _check_num_steps(one, _folders(one.workdir))
    write_json(path, asked)


def check_trained_as(one: SeedRun, meta: dict[str, Any], may_differ: tuple[str, ...] = ()) -> None:
    """Raises a UserError if a checkpoint was trained with another config than the run's.

    This happens if config.json was edited or checkpoints of another run were copied into the
    folder. Many fields do not change the shape of any array, so restoring would not fail.

    Args:
      one: the run.
      meta: the metadata of the checkpoint.
      may_differ: prefixes of additional fields that may differ.
    """
    trained = configs.to_dict(configs.upgrade(meta["config"]))
    different = configs.differences(trained, configs.to_dict(one.config), _MAY_CHANGE + may_differ)
    if different:
        raise UserError(
            f"the checkpoint of step {meta['step']} in {one.checkpoints} was trained with another "
            f"config than {one.workdir / 'config.json'} says; restore there: "
            + "; ".join(different)
        )


def _check_num_steps(one: SeedRun, folders: Sequence[Path]) -> None:
    """Raises a UserError if a run with these checkpoints cannot end at train.num_steps."""
    asked = one.config.train.num_steps
    done, folder = max(
        (step, folder / "checkpoints")
        for folder in folders
        for step in checkpoints.steps(folder / "checkpoints")
    )
    if asked < done:
        raise UserError(
            f"train.num_steps={asked} is less than the {done} steps that {one.workdir} has taken; "
            "ask for as many or more, or name another --workdir"
        )
    if asked == done and not checkpoints.read_meta(folder, done)["validation"]:
        raise UserError(
            f"train.num_steps={asked}: {one.workdir} was stopped after that step, before it was "
            "validated; ask for more steps"
        )
