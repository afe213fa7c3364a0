"""Orbax checkpoints with a checksum.

A checkpoint holds two items: "state" (the TrainState) and "meta" (JSON: step, examples read,
config, validation metrics, data checksum, digest). Orbax commits a checkpoint atomically but does
not detect flipped bytes. The digest therefore covers all arrays and the rest of "meta", and restore
verifies it.

States are saved from and restored to host memory, so a checkpoint does not depend on the devices.
If a run has several processes, all of them call these functions with the same shared folder. One
process writes; each process reads and verifies for itself, and they agree on the result.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from skyformer_jax.errors import UserError
from skyformer_jax.progress import say
from skyformer_jax.training import processes

_DELETED = "deleted"

# Sums of a TrainState that checkpoints of earlier versions lack.
LATER_SUMS = ("residual",)


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read or that differs from what was written."""


class _Best:
    """An Orbax preservation policy that keeps the checkpoint of the highest accuracy.

    Among equal accuracies it keeps the earliest step. Orbax's own policy stores accuracies in files
    that no checksum covers; if these are damaged, Orbax raises at every start or deletes the best
    checkpoint.
    """

    def __init__(self, accuracies: dict[int, float]) -> None:
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns True for each checkpoint to keep."""
        del context
        ranked = [c.step for c in checkpoints if c.step in self._accuracies]
        best = max(ranked, key=lambda step: (self._accuracies[step], -step), default=None)
        return [c.step == best for c in checkpoints]


def _accuracies(directory: Path) -> dict[int, float]:
    """Validation accuracy by step, of the validated checkpoints whose meta can be read."""
    found = {}
    for step in steps(directory):
        try:
            validation = read_meta(directory, step)["validation"]
        except DamagedCheckpointError as error:
            say(str(error))
            continue
        if validation:
            found[step] = validation["accuracy"]
    return found


def _remove_deleted(directory: Path) -> None:
    """Removes the checkpoints that Orbax has moved to the folder for deletion.

    Deletion in place could be interrupted, which would leave a partial checkpoint that looks
    finished.
    """
    if processes.is_first():
        for path in (directory / _DELETED).glob("*"):
            shutil.rmtree(path)


@contextlib.contextmanager
def open_saver(directory: Path) -> Iterator[Callable[[Any, dict[str, Any]], None]]:
    """Yields a function save(state, meta) that saves in the background.

    Leaving the context waits for all saves. The best checkpoint and the two latest are kept; two,
    in case the latest turns out to be damaged. state is a TrainState of NumPy arrays, which must
    not be modified afterwards. meta holds JSON values: meta["step"] numbers the checkpoint, and
    meta["validation"]["accuracy"] ranks it. A checkpoint whose "validation" is None is not ranked.

    Raises:
      RuntimeError: in save, if Orbax refuses to save.
      OSError, ValueError: in save or on exit, if an earlier save failed in the background.
      LostProcessError: if the block fails because another process ended.
    """
    _remove_deleted(directory)
    accuracies = _accuracies(directory)
    latest = checkpoint_managers.LatestN(2)
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        todelete_subdir=_DELETED,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, _Best(accuracies)]),
    )
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(ocp.CheckpointManager(directory.absolute(), options=options))

        def save(state: Any, meta: dict[str, Any]) -> None:
            meta = {**meta, "digest": digest(state, meta)}
            if meta["validation"]:
                accuracies[meta["step"]] = meta["validation"]["accuracy"]
            items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
            if not manager.save(meta["step"], args=ocp.args.Composite(**items), force=True):
                raise RuntimeError(f"Orbax did not save step {meta['step']}")
            _remove_deleted(directory)

        try:
            with processes.lost_process_errors():
                yield save
        except processes.LostProcessError:
            stack.pop_all()  # closing the manager would wait for the lost process
            raise
    _remove_deleted(directory)


def digest(state: Any, meta: dict[str, Any]) -> str:
    """Returns the SHA-256 of every array with its path, dtype and shape, and of the metadata.

    Args:
      state: a tree of NumPy arrays.
      meta: the metadata; its "digest" is left out.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    rest = {key: value for key, value in meta.items() if key != "digest"}
    sha.update(json.dumps(rest, sort_keys=True).encode())
    return sha.hexdigest()


def steps(directory: Path) -> list[int]:
    """Returns the steps of the finished checkpoints in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _restore(directory: Path, step: int, **items: Any) -> Any:
    """Reads items of a checkpoint; any error but PermissionError counts as damage."""
    path = directory.absolute() / str(step)
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"only{process}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**items))
    except PermissionError:
        raise
    except Exception as error:  # Orbax and its storage raise many types
        if not path.exists():
            raise DamagedCheckpointError(
                f"checkpoint {path} no longer exists: a run that is training there replaced it; "
                "evaluate again"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {reason}") from None


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """Reads the "meta" of a checkpoint without verifying it.

    Raises:
      DamagedCheckpointError: if it cannot be read.
    """
    meta = _restore(directory, step, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict):
        raise DamagedCheckpointError(f"checkpoint {directory / str(step)} is damaged: no metadata")
    return meta


def restore(directory: Path, step: int, state_spec: Any) -> tuple[Any, dict[str, Any]]:
    """Restores and verifies the state and the meta of a checkpoint.

    Args:
      directory: the folder of the checkpoints.
      step: the step of the checkpoint.
      state_spec: a TrainState of ShapeDtypeStructs.

    Returns:
      The state, with NumPy arrays, and the meta. Sums named in LATER_SUMS that the checkpoint
      lacks are NaN.

    Raises:
      DamagedCheckpointError: if the checkpoint cannot be read or differs from what was written.
    """
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state_spec)
    try:
        return _restore_as(target, directory, step)
    except DamagedCheckpointError:
        sums = getattr(target, "sums", {})
        later = {name: x for name, x in sums.items() if name in LATER_SUMS}
        if not later:
            raise
    earlier = {name: x for name, x in sums.items() if name not in later}
    state, meta = _restore_as(target.replace(sums=earlier), directory, step)
    unknown = jax.tree.map(lambda x: np.full_like(x, np.nan), later)
    return state.replace(sums=state.sums | unknown), meta


def _restore_as(target: Any, directory: Path, step: int) -> tuple[Any, dict[str, Any]]:
    """Restores and verifies a checkpoint whose state has the structure of target."""
    items = _restore(
        directory,
        step,
        state=ocp.args.StandardRestore(target),
        meta=ocp.args.JsonRestore(),
    )
    state, meta = items["state"], items["meta"]
    if not isinstance(meta, dict) or digest(state, meta) != meta.get("digest"):
        raise DamagedCheckpointError(
            f"checkpoint {directory / str(step)} is damaged: it does not match its checksum"
        )
    return state, meta


def restore_latest(directories: Sequence[Path], state_spec: Any) -> tuple[list[Any], int] | None:
    """Restores the newest step whose checkpoints in all directories are intact.

    A damaged checkpoint is reported and moved to a folder "damaged" beside its directory, since
    Orbax does not save a step below an existing one. Newer checkpoints that some directories lack,
    because the run was killed between their saves, are moved to a folder "ahead".

    Args:
      directories: the checkpoint folders of the models that are trained at once.
      state_spec: shapes and dtypes of the state of one model, see restore.

    Returns:
      The states and their step; None if no checkpoint exists.

    Raises:
      UserError: if checkpoints exist but all of them are damaged.
    """
    damaged = False
    while (newest := _newest_of_all(directories)) is not None:
        states, reason = [], f"another process cannot read the checkpoint of step {newest}"
        for directory in directories:
            try:
                states.append(restore(directory, newest, state_spec)[0])
            except DamagedCheckpointError as error:
                reason = str(error)
                break
        # If one process cannot read a checkpoint, no process goes on from it.
        num_whole = min(processes.all_gather(len(states)))
        if num_whole == len(directories):
            break
        damaged = True
        aside = _put_aside(directories[num_whole], [newest], "damaged")
        say(f"{reason}; moved it to {aside}")
    if newest is None and damaged:
        folders = ", ".join(str(directory.parent / "damaged") for directory in directories)
        raise UserError(
            f"all checkpoints were damaged and moved to {folders}; start again to train from the "
            "beginning"
        )
    for directory in directories:
        ahead = [step for step in steps(directory) if newest is None or step > newest]
        _put_aside(directory, ahead, "ahead")
    return None if newest is None else (states, newest)


def _newest_of_all(directories: Sequence[Path]) -> int | None:
    """The newest step that all directories have, or None."""
    common = set.intersection(*(set(steps(directory)) for directory in directories))
    return processes.broadcast(max(common, default=None))


def _put_aside(directory: Path, found: Sequence[int], name: str) -> Path:
    """Moves checkpoints to the folder of this name beside the directory; returns that folder."""
    aside = directory.parent / name
    with processes.barrier():
        if found and processes.is_first():
            aside.mkdir(exist_ok=True)
            number = sum(1 for _ in aside.iterdir())
            for i, step in enumerate(found):
                (directory / str(step)).rename(aside / f"{step}-{number + i}")
    return aside


def find(directory: Path, which: str) -> int:
    """Returns the step of a checkpoint.

    Args:
      directory: the folder of the checkpoints.
      which: "best" by validation accuracy, "latest", or a step in digits.

    Raises:
      UserError: if there is no such checkpoint; the message names those that exist.
    """
    found = steps(directory)
    if not found:
        raise UserError(f"{directory} has no checkpoint yet")
    if which == "latest":
        return found[-1]
    if which == "best":
        accuracies = _accuracies(directory)
        if not accuracies:
            raise UserError(f"no checkpoint of {directory} was validated; use --checkpoint=latest")
        return max(accuracies, key=lambda step: (accuracies[step], -step))
    if which.isdigit() and int(which) in found:
        return int(which)
    raise UserError(
        f"no checkpoint {which!r} in {directory}; "
        f"choose best, latest or one of: {', '.join(map(str, found))}"
    )
