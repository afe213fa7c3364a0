"""The training loop: trains and evaluates the model of a config, and resumes interrupted runs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from skyformer_jax.data.batches import (
    Batch,
    Stage,
    checksum_of_stages,
    stack_batches,
    staged_batches,
)
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError, full_disk
from skyformer_jax.files import expand
from skyformer_jax.progress import say
from skyformer_jax.training import checkpoints, compilation_cache, evaluation, processes
from skyformer_jax.training import config as configs
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training.logs import plot_learning_curve
from skyformer_jax.training.optimizer import make_schedule
from skyformer_jax.training.recorder import open_recorder
from skyformer_jax.training.released import start_from
from skyformer_jax.training.results import print_summary
from skyformer_jax.training.run import Run, new_run
from skyformer_jax.training.sharded_step import PredictStep, make_predict_step, make_train_step
from skyformer_jax.training.state import TrainState, init_states, state_spec, take
from skyformer_jax.training.workdir import (
    SeedRun,
    check_trained_as,
    check_visible,
    open_workdir,
    seed_runs,
    with_kind,
)


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any] | None:
    """Trains to the end, resuming the workdir's newest checkpoint if there is one, then evaluates.

    Args:
      config: a config such as those of configs/; fields that it lacks have their defaults.
      workdir: the folder for config.json, checkpoints/, metrics.jsonl, tensorboard/,
        learning_curve.png and eval_test.json. If num_seeds is above 1, the subfolders seed-0,
        seed-1, ... hold these files, each as a run of that seed alone would write them, and the
        workdir holds config.json and a summary, eval_test.json.

    Returns:
      The result of evaluate for the best checkpoint on the test split; None if a signal stopped
      the run before its end.

    Raises:
      UserError: if the config, the data or the workdir is invalid, or a loss or gradient is not
        finite and train.non_finite does not skip that step.
    """
    workdir, config = expand(workdir), configs.complete(config)
    parallel = config.parallel
    processes.start(parallel.coordinator, parallel.num_processes, parallel.process_id)
    config = with_kind(config, workdir)
    run = new_run(config)
    compilation_cache.use_cache(config.compilation_cache)
    seeds = seed_runs(config, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(full_disk(workdir))
        stack.enter_context(processes.lost_process_errors())
        with processes.barrier():
            if processes.is_first():
                stack.enter_context(open_workdir(run, workdir))
        with processes.barrier():
            check_visible(workdir)
            stages, validation_split = run.load_stages(), run.load_split("validation")
        predict_step = make_predict_step(run)
        with processes.stop_signals() as should_stop:
            step = _fit(run, seeds, stages, validation_split, predict_step, should_stop)
        with processes.barrier():  # waits until the last checkpoint is complete
            pass
        if step < config.train.num_steps:
            say(f"stopped after step {step}; saved. Start the same command to go on.")
            return None
        found = evaluation.evaluate_run(run, workdir, predict_step)
        if processes.is_first():
            found.write()
            for one in seeds:
                plot_learning_curve(one.workdir, found.result["floors"])
    if processes.is_first():
        print_summary(workdir, found.result)
    return found.result


def _fit(
    run: Run,
    seeds: Sequence[SeedRun],
    stages: Sequence[Stage],
    validation_split: Examples,
    predict_step: PredictStep,
    should_stop: Callable[[int], bool],
) -> int:
    """Trains from the newest checkpoint to the end or a signal; returns the last step taken."""
    num_steps, eval_every = run.config.train.num_steps, run.config.train.eval_every
    data = checksum_of_stages(stages)
    states, step = _restore_or_init(run, seeds, len(stages[-1].examples), data)
    if step == num_steps:
        return step
    train_step = make_train_step(run)
    batches = _training_batches(run, stages, step)
    with open_recorder(run, seeds, step) as recorder, _open_savers(run, seeds, data) as save:
        while step < num_steps:
            with recorder.reading():
                batch = next(batches)
            with recorder.dispatching(batch):
                states, sums = train_step(states, batch)
            step += 1
            recorder.add(step, sums)

            validating = step % eval_every == 0 or step == num_steps
            stopping = should_stop(step)
            if validating or stopping:
                recorder.flush()
            if validating:
                with recorder.pausing():
                    scores = _validate(run, predict_step, states, validation_split)
                    recorder.validation(step, scores)
                    save(step, states, scores)
            elif stopping:
                save(step, states, None)
            if stopping:
                break
    return step


def _restore_or_init(
    run: Run, seeds: Sequence[SeedRun], num_examples: int, data: str
) -> tuple[TrainState, int]:
    """Returns the states of the newest checkpoint, or initial states, and their step.

    Args:
      run: the run.
      seeds: the models of the run.
      num_examples: number of training examples.
      data: checksum of the training examples.

    Raises:
      UserError: if all checkpoints are damaged, or the newest was trained on other data.
    """
    restored = checkpoints.restore_latest([one.checkpoints for one in seeds], state_spec(run))
    if restored is not None:
        found, step = restored
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
        meta = checkpoints.read_meta(seeds[0].checkpoints, step)
        check_trained_as(seeds[0], meta)
        if meta.get("data", data) != data:  # earlier versions did not store it
            raise UserError(
                f"{seeds[0].workdir} was trained on other data (checksum {meta['data']}) than "
                f"data.dir={run.config.data.dir} holds ({data}); choose the former by "
                "--config.data.dir or --config.data.source, or name another --workdir"
            )
        say(f"going on from the checkpoint of step {step}" + _change_of_schedule(run, meta, step))
        return jax.device_put(stacked, meshes.replicated(run.mesh)), step
    states, config = init_states(run), run.config
    num_parameters = sum(p.size for p in jax.tree.leaves(states.params)) // len(seeds)
    say(
        f"training {config.attention.name} on {config.task}: {num_examples:,} examples, "
        f"{config.train.num_steps:,} steps of {config.train.batch_size}, "
        f"{num_parameters:,} parameters, {meshes.describe(run.mesh)}"
        + (f", {len(seeds)} seeds at once" if len(seeds) > 1 else "")
    )
    if config.train.curriculum:
        stages = zip(config.train.curriculum, config.train.curriculum_steps, strict=True)
        say(
            f"curriculum: {', '.join(f'{name} to step {end:,}' for name, end in stages)}, then "
            f"{config.task}, which all validations have"
        )
    if config.train.start_from:
        states, kept = start_from(states, config.train.start_from)
        new = f", new: {', '.join(kept)}" if kept else ""
        say(f"the parameters start from {config.train.start_from}{new}")
        states = jax.device_put(states, meshes.replicated(run.mesh))
    return states, 0


def _change_of_schedule(run: Run, meta: dict[str, Any], step: int) -> str:
    """Describes how a changed train.num_steps affects the learning rate; "" if it is unchanged."""
    before = ml_collections.ConfigDict(meta["config"]["train"])
    num_steps = run.config.train.num_steps
    if before.num_steps == num_steps:
        return ""
    was, now, end = (
        f"{float(rate):.2e}"
        for rate in (
            make_schedule(before)(step),
            run.schedule(step),
            run.schedule(num_steps),
        )
    )
    return (
        f"; train.num_steps was {before.num_steps} and is {num_steps}, so the learning rate "
        f"follows the new schedule from here: {now} at this step, not {was}, and {end} at the end"
    )


def _training_batches(run: Run, stages: Sequence[Stage], first_step: int) -> Iterator[Batch]:
    """Yields the batches of all seeds, [seeds, batch, ...] on the mesh, from first_step on."""
    config = run.config
    streams = [
        staged_batches(
            stages,
            config.train.batch_size,
            config.model.max_length,
            seed=seed,
            first_step=first_step,
            buckets=config.data.buckets,
            balanced=config.train.balanced,
            sample_length=config.train.sample_length,
            sample_steps=config.train.sample_steps,
            shards=meshes.local_shards(run.mesh),
        )
        for seed in run.seeds
    ]
    for batches in zip(*streams, strict=True):
        yield meshes.shard_batch(stack_batches(batches), run.mesh, axis=1)


def _validate(
    run: Run, predict_step: PredictStep, states: TrainState, examples: Examples
) -> list[dict[str, float]]:
    """Computes the scores of each seed's model on a split."""
    logits = evaluation.predict(run, predict_step, states.variables, examples)
    return [evaluation.score(of_seed, examples.label) for of_seed in logits]


@contextlib.contextmanager
def _open_savers(
    run: Run, seeds: Sequence[SeedRun], data: str
) -> Iterator[Callable[[int, TrainState, Sequence[dict[str, float]] | None], None]]:
    """Yields a function save(step, states, scores) that saves a checkpoint of each seed.

    scores are the validation scores of the seeds, or None. data is the checksum of the training
    examples.
    """
    with contextlib.ExitStack() as stack:
        savers = [stack.enter_context(checkpoints.open_saver(one.checkpoints)) for one in seeds]

        def save(step: int, states: TrainState, scores: Sequence[dict[str, float]] | None) -> None:
            host_states = jax.device_get(states)
            for i, (one, save_one) in enumerate(zip(seeds, savers, strict=True)):
                meta = {
                    "step": step,
                    "examples_read": step * run.config.train.batch_size,
                    "validation": None if scores is None else scores[i],
                    "config": configs.to_dict(one.config),
                    "data": data,
                }
                save_one(jax.tree.map(np.asarray, take(host_states, i)), meta)

        yield save
