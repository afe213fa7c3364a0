"""Checkpoints by Orbax, with a checksum of our own.

Each holds two items: "state" (the TrainState) and "meta" (JSON: step, examples read, config,
validation metrics, digest). Orbax commits a checkpoint atomically, but restores flipped bytes
without a word. So the digest covers all arrays and the rest of "meta", and is compared on restore.

A state is written from and read into host memory, so a checkpoint does not depend on the devices.
If a run has several processes, all call these functions, with one folder that all of them see: one
process writes, each reads and verifies for itself, and they agree on what they found.
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

# Sums of a state that checkpoints of earlier versions do not have.
LATER_SUMS = ("residual",)


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read, or is not what was written."""


class _Best:
    """An Orbax preservation policy: keeps the checkpoint of the greatest accuracy, first of equals.

    Orbax would keep accuracies in files of its own, which no checksum covers. If these are damaged,
    it raises at every start, or deletes the best checkpoint.
    """

    def __init__(self, accuracies: dict[int, float]) -> None:
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of the checkpoints."""
        del context
        ranked = [c.step for c in checkpoints if c.step in self._accuracies]
        best = max(ranked, key=lambda step: (self._accuracies[step], -step), default=None)
        return [c.step == best for c in checkpoints]


def _accuracies(directory: Path) -> dict[int, float]:
    """Validation accuracy of every checkpoint that was validated and whose meta can be read."""
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
    """Removes the checkpoints that Orbax has moved away for deletion.

    If it deleted them in place, a kill might leave half of one that looks finished.
    """
    if processes.is_first():
        for path in (directory / _DELETED).glob("*"):
            shutil.rmtree(path)


@contextlib.contextmanager
def open_saver(directory: Path) -> Iterator[Callable[[Any, dict[str, Any]], None]]:
    """A function save(state, meta) that returns before its files are complete; the end waits.

    The two latest checkpoints are kept, in case the latest turns out to be damaged, and the best.
    state is a TrainState of NumPy arrays, which must not change. meta holds JSON values;
    meta["step"] numbers the checkpoint, meta["validation"]["accuracy"] ranks it (if "validation" is
    None, the checkpoint is not ranked).

    Raises:
      RuntimeError: in save, if Orbax declines to.
      OSError, ValueError: in save or at the end, if an earlier save failed in the background.
      LostProcessError: if its block fails because another process ended.
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
            stack.pop_all()  # closing the manager would wait for that process
            raise
    _remove_deleted(directory)


def digest(state: Any, meta: dict[str, Any]) -> str:
    """SHA-256 of every array with its path, dtype and shape, and of meta without its digest.

    The state's arrays are NumPy's.
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
    """The numbers of the finished checkpoints, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _restore(directory: Path, step: int, **items: Any) -> Any:
    """Reads items of a checkpoint; any failure but missing rights means damage."""
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
    except Exception as error:  # Orbax and its storage raise a dozen kinds
        if not path.exists():
            raise DamagedCheckpointError(
                f"checkpoint {path} does not exist any longer: a run that trains there has "
                "replaced it; evaluate again"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {reason}") from None


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The "meta" of a checkpoint, not verified.

    Raises:
      DamagedCheckpointError: if it cannot be read.
    """
    meta = _restore(directory, step, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict):
        raise DamagedCheckpointError(f"checkpoint {directory / str(step)} is damaged: no metadata")
    return meta


def restore(directory: Path, step: int, state_spec: Any) -> tuple[Any, dict[str, Any]]:
    """The state and the meta of a checkpoint, verified.

    Args:
      directory: the folder of the checkpoints.
      step: the checkpoint's number.
      state_spec: a TrainState of ShapeDtypeStructs.

    Returns:
      The state, of NumPy arrays, and the meta. Those of LATER_SUMS that the checkpoint does not
      have are NaN.

    Raises:
      DamagedCheckpointError: if it cannot be read, or differs from what was written.
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
    """The state, of the structure of the target, and the meta of a checkpoint, verified."""
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
    """The states of the newest step that is whole in all directories, or None if there is none.

    A damaged checkpoint is reported and moved to a folder "damaged" beside its directory, since
    Orbax would not save a step below it. Checkpoints that not all directories have, as a kill
    between their saves leaves them, are moved to a folder "ahead".

    Args:
      directories: folders of the checkpoints of the models that are trained at once.
      state_spec: the state of one model, see restore.

    Returns:
      The states and their step.

    Raises:
      UserError: if there were checkpoints, and all are damaged.
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
    """The newest step that all directories have."""
    common = set.intersection(*(set(steps(directory)) for directory in directories))
    return processes.broadcast(max(common, default=None))


def _put_aside(directory: Path, found: Sequence[int], name: str) -> Path:
    """Moves checkpoints to a folder of that name beside the directory; returns the folder."""
    aside = directory.parent / name
    with processes.barrier():
        if found and processes.is_first():
            aside.mkdir(exist_ok=True)
            number = sum(1 for _ in aside.iterdir())
            for i, step in enumerate(found):
                (directory / str(step)).rename(aside / f"{step}-{number + i}")
    return aside


def find(directory: Path, which: str) -> int:
    """The number of the checkpoint "best", "latest" or a step given in digits.

    Raises:
      UserError: if there is none, naming those that exist.
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
