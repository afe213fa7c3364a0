"""The training loop: from a config and a workdir to an evaluated model, interruptions included."""

import collections
import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import skyformer_jax.config
from skyformer_jax.data.batches import (
    evaluation_batches,
    stacked,
    training_batches,
    training_rows,
)
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError, full_disk
from skyformer_jax.models import build_model
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, compilation, evaluation, logs, processes, steps
from skyformer_jax.training import mesh as meshes

# Steps that may be dispatched and not finished: enough to keep a device busy, few enough that
# stopping is prompt and their batches fit.
_IN_FLIGHT = 8


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any] | None:
    """Trains to the end, goes on where an earlier run in the workdir stopped, then evaluates.

    Args:
      config: as the files in configs/ build it.
      workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/, learning_curve.png and
        eval_test.json; with num_seeds above 1 its folders seed-0, ... get these, each what a run
        of that seed alone would make, and it gets config.json and a summary, eval_test.json.

    Returns:
      What evaluate returns for the best checkpoint on the test split; None if a signal stopped
      the run before its end.

    Raises:
      UserError: for a config, data or a workdir that cannot work, or if a loss is not finite.
    """
    workdir, parallel = Path(workdir), config.parallel
    processes.start(parallel.coordinator, parallel.num_processes, parallel.process_id)
    skyformer_jax.config.check(config, jax.device_count())
    if parallel.backend == "pmap" and jax.process_count() > 1:
        raise UserError("parallel.backend=pmap is for one process; several need shard_map")
    compilation.use_cache(config.compilation_cache)
    mesh = meshes.make_mesh(*skyformer_jax.config.mesh_shape(config, jax.device_count()))
    model = build_model(config, axis_name=meshes.sequence_axis(mesh))
    optimizer = steps.make_optimizer(config)
    abstract_state = steps.abstract_state(config, model, optimizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(full_disk(workdir))
        stack.enter_context(processes.others_needed())
        with processes.together():
            if processes.is_first():
                stack.enter_context(_open_workdirs(workdir, config, abstract_state))
        with processes.together():
            if not (workdir / "config.json").exists():
                raise UserError(
                    f"process {jax.process_index()} does not see {workdir}, where process 0 made "
                    "config.json: --workdir must be on a disk that all of them share"
                )
            splits = tuple(
                evaluation.load_split(config, split) for split in ("train", "validation")
            )
        with processes.stop_signals() as stop:
            step = _run(config, workdir, model, optimizer, mesh, abstract_state, splits, stop)
        with processes.together():  # the last checkpoint is complete
            pass
        if step < config.train.num_steps:
            say(f"stopped after step {step}; saved. Start the same command to go on.")
            return None
        result = evaluation.evaluate(workdir)
        if processes.is_first():
            for _, run in skyformer_jax.config.single_runs(config, workdir):
                logs.plot_learning_curve(run, result["floors"])
            _print_summary(workdir, result)
        return result


def _run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    model: Any,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    abstract_state: steps.TrainState,
    splits: tuple[Examples, Examples],
    stop: Callable[[int, int], bool],
) -> int:
    """Steps from the newest checkpoint to the end or to a signal; returns the last step taken."""
    settings = config.train
    train_split, validation_split = splits
    runs = skyformer_jax.config.single_runs(config, workdir)
    seeds = [one.seed for one, _ in runs]
    directories = [run / "checkpoints" for _, run in runs]
    restored = checkpoints.restore_latest(directories, abstract_state)
    replicated = meshes.replicated(mesh)
    if restored is None:
        init = jax.jit(steps.init_states, static_argnums=(1, 2, 3, 4), out_shardings=replicated)
        states = init(seeds, model, optimizer, steps.token_shape(config), settings.statistics)
        step = 0
        say(
            f"training {config.attention.name} on {config.task}: {len(train_split.label):,} "
            f"examples, {settings.num_steps:,} steps of {settings.batch_size}, "
            f"{sum(p.size for p in jax.tree.leaves(states.params)) // len(seeds):,} parameters, "
            f"{_devices(mesh)}" + (f", {len(seeds)} seeds at once" if len(seeds) > 1 else "")
        )
    else:
        found, step = restored
        states = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *found), replicated)
        say(f"going on from the checkpoint of step {step}")
    if step == settings.num_steps:
        return step

    train_step = steps.train_step_of(config, model, optimizer, mesh)
    # Calls of several steps read the data on the device, where there is room for them.
    table = steps.make_table(train_split, mesh) if settings.steps_per_call > 1 else None
    predict_step = steps.make_predict_step(model, mesh, steps.reading_of(config))
    schedule = steps.learning_rate_schedule(config)
    run_logs = []
    progress = logs.Progress(step, settings.num_steps)
    outstanding = collections.deque()  # (step, its sums, still on their way)
    clock = _Clock(step)
    compiled = set()  # shapes of batches

    def finish_one() -> None:
        done, sums = outstanding.popleft()
        jax.block_until_ready(sums)
        progress.step(done)
        logging = done % settings.log_every == 0 or done == settings.num_steps
        if not logging and done % settings.eval_every:
            return
        sums = jax.device_get(sums)
        _check_finite(config, sums, done, runs, tell=logging)
        if not logging:
            return
        lap = clock.lap(done)
        rate = lap.pop("steps_per_second") * settings.batch_size
        losses, accuracies = sums["loss"] / sums["examples"], sums["correct"] / sums["examples"]
        progress.metrics(
            done,
            loss=float(losses.mean()),
            accuracy=float(accuracies.mean()),
            rate=rate * len(seeds),
        )
        steps_of_window = (done - 1) % settings.log_every + 1
        for i, log in enumerate(run_logs):
            log.write(
                done,
                "train",
                loss=float(losses[i]),
                accuracy=float(accuracies[i]),
                learning_rate=float(schedule(done - 1)),
                examples_per_second=rate,
                **_statistics(steps.take(sums, i), steps_of_window),
                **lap,
            )

    def validate() -> list[dict[str, float]]:
        batches = evaluation_batches(
            validation_split,
            settings.batch_size,
            config.model.max_length,
            buckets=buckets,
            shards=part,
        )
        logits = evaluation.predict(predict_step, states.variables, batches, mesh)
        scores = [evaluation.score(of_seed, validation_split.label) for of_seed in logits]
        for log, score in zip(run_logs, scores, strict=False):
            log.write(step, "validation", **score)
        mean = {k: sum(score[k] for score in scores) / len(scores) for k in scores[0]}
        say(
            f"step {step}/{settings.num_steps}  validation loss {mean['loss']:.4f}  "
            f"accuracy {mean['accuracy']:.4f}"
        )
        return scores

    def save(validations: list[dict[str, float] | None]) -> None:
        in_host = jax.device_get(states)
        for i, (one, validation) in enumerate(zip(runs, validations, strict=True)):
            meta = {
                "step": step,
                "examples_read": step * settings.batch_size,
                "validation": validation,
                "config": skyformer_jax.config.to_dict(one[0]),
            }
            state = jax.tree.map(np.asarray, steps.take(in_host, i))
            savers[i](state, meta)

    buckets = config.data.get("buckets", ())
    part = meshes.part_of_process(mesh)
    if table is None:
        streams = [
            training_batches(
                train_split,
                settings.batch_size,
                config.model.max_length,
                seed=seed,
                first_step=step,
                buckets=buckets,
                shards=part,
            )
            for seed in seeds
        ]
    else:
        streams = [
            (
                part.rows(rows)
                for rows in training_rows(
                    len(train_split), settings.batch_size, seed=seed, first_step=step
                )
            )
            for seed in seeds
        ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(progress))
        for _, run in runs if processes.is_first() else []:  # one process writes for all
            run_logs.append(stack.enter_context(contextlib.closing(logs.MetricsLog(run, step))))
        savers = [stack.enter_context(checkpoints.open_saver(d)) for d in directories]
        while step < settings.num_steps:
            with clock.input():
                batch = stacked(streams, settings.steps_per_call)
                batch = meshes.shard_batch(batch, mesh, axis=2)
            shape = jax.tree.leaves(batch)[0].shape
            with contextlib.nullcontext() if shape in compiled else clock.compiling():
                states, sums = train_step(states, batch, table)
            compiled.add(shape)
            step += settings.steps_per_call
            outstanding.append((step, sums))
            due = step % settings.eval_every == 0 or step == settings.num_steps
            stopping = stop(step - settings.steps_per_call, step)
            while outstanding and (due or stopping or len(outstanding) > _IN_FLIGHT):
                finish_one()
            if due:
                with clock.paused():
                    save(validate())
            if stopping:
                if not due:
                    _check_finite(config, jax.device_get(sums), step, runs, tell=False)
                    save([None] * len(seeds))
                break
    return step


def _devices(mesh: jax.sharding.Mesh) -> str:
    """The mesh in words."""
    text = f"{mesh.size} {jax.devices()[0].platform} device(s)"
    if mesh.shape[meshes.SEQ] > 1:
        text += f" ({mesh.shape[meshes.DATA]} along data, {mesh.shape[meshes.SEQ]} along seq)"
    return text + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")


def _check_finite(
    config: ml_collections.ConfigDict,
    sums: dict[str, np.ndarray],
    done: int,
    runs: list[tuple[ml_collections.ConfigDict, Path]],
    *,
    tell: bool,
) -> None:
    """Raises a UserError where loss or gradients of a step were not finite and must not be.

    Args:
      config: says which.
      sums: of all seeds, since the last multiple of train.log_every.
      done: the step that they reach to.
      runs: of the seeds.
      tell: whether to say what was skipped.
    """
    for skipped, first, examples, (one, run) in zip(
        sums["skipped"], sums["first_skipped"], sums["examples"], runs, strict=True
    ):
        if not skipped:
            continue
        what = f"loss or gradients are not finite at step {first}, seed {one.seed}"
        if config.train.non_finite == "stop" or not examples:
            raise UserError(
                f"{what}; the last good checkpoint is kept in {run / 'checkpoints'}; lower "
                "train.learning_rate"
                + (
                    ", or skip such steps by train.non_finite=skip"
                    if examples
                    else f" (none of the {skipped} steps up to {done} was finite)"
                )
            )
        if tell:
            say(f"{what}; {skipped} step(s) up to {done} skipped")


def _statistics(sums: dict[str, np.ndarray], num_steps: int) -> dict[str, float]:
    """What is logged beside loss and accuracy of so many steps: skipped ones, and train.statistics.

    gradient_norm is the mean norm of the gradient before clipping, block_<i>_rms the root mean
    square of what a block returns, at real tokens.
    """
    found = {"skipped": int(sums["skipped"])} if sums["skipped"] else {}
    if "gradient_norm" in sums:
        finite = num_steps - int(sums["skipped"])
        found["gradient_norm"] = float(sums["gradient_norm"]) / finite
        for i, mean_square in enumerate(sums["mean_square"]):
            found[f"block_{i}_rms"] = float(mean_square / finite) ** 0.5
    return found


class _Clock:
    """Steps per second since the last question, leaving out what is paused or compiled."""

    def __init__(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()
        self._input = self._compile = 0.0

    def lap(self, step: int) -> dict[str, float]:
        """Since the last lap: steps_per_second, and the share of the time that input took.

        Where something was compiled, compile_seconds says how long that took.
        """
        now = time.perf_counter()
        elapsed = now - self._start
        found = {
            "steps_per_second": (step - self._step) / elapsed,
            "input_share": self._input / elapsed,
        }
        if self._compile:
            found["compile_seconds"] = self._compile
        self._step, self._start = step, now
        self._input = self._compile = 0.0
        return found

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Counts its block as input; the devices may be busy with earlier steps meanwhile."""
        begin = time.perf_counter()
        yield
        self._input += time.perf_counter() - begin

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Leaves its block, the first call of a program, out, and says how long it took."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._compile += seconds
        self._start += seconds
        say(f"the training step compiled in {seconds:.1f} s")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves its block out."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


def _check_disk(workdir: Path, num_runs: int, abstract_state: steps.TrainState) -> None:
    """Raises a UserError where the checkpoints of a run would not fit."""
    # Three checkpoints kept, one being written, and one about to be removed.
    needed = 5 * num_runs * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
    needed += 16 << 20
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of {workdir} has {free / 2**20:,.0f} MiB free; a run of this config "
            f"needs {needed / 2**20:,.0f} MiB: free some space or name another --workdir"
        )


@contextlib.contextmanager
def _open_workdirs(
    workdir: Path, config: ml_collections.ConfigDict, abstract_state: steps.TrainState
) -> Iterator[None]:
    """Makes or checks the workdir, and those of its seeds, and holds them against other runs."""
    runs = skyformer_jax.config.single_runs(config, workdir)
    _check_disk(workdir, len(runs), abstract_state)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_open_workdir(workdir, config))
        for one, run in runs:
            if run != workdir:
                stack.enter_context(_open_workdir(run, one))
        yield


@contextlib.contextmanager
def _open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Holds one workdir, whose config binds once it or its seeds have checkpoints."""
    for parent in (workdir, *workdir.parents):
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--workdir={workdir}: {parent} is a file; name a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {workdir}") from None
        path = workdir / "config.json"
        asked = skyformer_jax.config.stored(config)
        begun = any(
            checkpoints.steps(p / "checkpoints") for p in (workdir, *workdir.glob("seed-*"))
        )
        if begun and not path.exists():
            raise UserError(f"{workdir} has checkpoints but no config.json; name another --workdir")
        if begun:  # else nothing depends on the config of an earlier attempt
            saved = skyformer_jax.config.to_dict(skyformer_jax.config.read(path))
            different = skyformer_jax.config.differences(saved, asked)
            if different:
                raise UserError(
                    f"{workdir} holds a run of another config; name another --workdir, or restore: "
                    + "; ".join(different)
                )
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(asked, indent=1) + "\n")
        partial.replace(path)
        yield


def _print_summary(workdir: Path, result: dict[str, Any]) -> None:
    print(evaluation.table(result))
    if "seeds" in result:
        print(f"\neach seed         {workdir}/seed-*: checkpoints, metrics, learning curve")
    else:
        validation = result["validation"]
        print(
            f"\nbest checkpoint   {workdir}/checkpoints/{result['checkpoint']} "
            f"(validation accuracy {100 * validation['accuracy']:.2f} %)\n"
            f"metrics           {workdir}/metrics.jsonl\n"
            f"learning curve    {workdir}/learning_curve.png"
        )
    print(
        f"TensorBoard       tensorboard --logdir {workdir}\n"
        f"evaluate again    python eval.py --workdir={workdir}"
    )
