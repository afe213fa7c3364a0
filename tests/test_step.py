"""The training step and predictions: devices, seeds, microbatches and non-finite values."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from run_on import run_on
from test_model import tiny_config
from tiny_data import from_sequences

from skyformer_jax import attention
from skyformer_jax.data.batches import Batch, stack_batches
from skyformer_jax.training import checkpoints, evaluation, step
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training.sharded_step import make_predict_step, make_train_step
from skyformer_jax.training.state import init_states, state_spec, take


def random_batch(count, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rng.integers(1, 16, (count, 48), np.uint8),
        rng.integers(1, 48, count, np.int32),
        rng.integers(0, 10, count, np.int32),
    )


def sharded(run, *batches):
    """Stacks one batch per seed and shards them as the compiled step expects."""
    return meshes.shard_batch(stack_batches(batches), run.mesh, axis=1)


def two_steps(config, data, seq, backend, accumulation):
    """Parameters and sums after two steps of SGD, which shows a wrong scale of the gradient."""
    config = config.copy_and_resolve_references()
    config.parallel.backend = backend
    settings = {"log_every": 2, "accumulation": accumulation, "statistics": True}
    run = run_on(config, data, seq, optimizer=optax.sgd(1.0), **settings)
    states, train_step = init_states(run), make_train_step(run)
    for seed in range(2):
        batch = random_batch(16, seed)  # shards of 12 or 6 positions can be all padding
        batch = batch._replace(length=batch.length // 3 + 1)
        states, sums = train_step(states, sharded(run, batch))
        jax.block_until_ready(sums)
    return jax.device_get((states.params, sums))


WAYS = [
    (data, 1, backend, accumulation)
    for backend in ("shard_map", "pmap")
    for data in (1, 2, 4, 8)
    for accumulation in (1, 2)
    if data > 1 or backend == "pmap"
]
SPLIT_WAYS = [(1, 8, "shard_map", 1), (2, 4, "shard_map", 2), (4, 2, "shard_map", 1)]
QUICK = [("skyformer", [(2, 4, "shard_map", 2), (4, 1, "pmap", 1)])]


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        *QUICK,
        *[pytest.param(name, WAYS, marks=pytest.mark.slow) for name in attention.NAMES],
        *[pytest.param(name, SPLIT_WAYS, marks=pytest.mark.slow) for name in attention.SPLITTABLE],
    ],
)
def test_meshes_do_not_change_the_step(name, ways):
    """Any mesh, back end and number of microbatches gives the step of one device.

    Dropout, landmarks, padding and each attention's random draws depend only on the position in
    the batch and in the sequence, and n-grams go across the parts of a sequence.
    """
    config = tiny_config(name, num_layers=1, ngrams=(3,))
    params, sums = two_steps(config, 1, 1, "shard_map", 1)
    initial = init_states(run_on(config)).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, initial)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert sums["examples"] == [32] and sums["skipped"] == [0]
    assert sums["gradient_norm"] > 0 and sums["mean_square"].shape == (1, 1)
    for way in ways:
        other_params, other_sums = two_steps(config, *way)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6),
            other_params,
            params,
        )
        for of_way, expected in zip(other_sums.values(), sums.values(), strict=True):
            np.testing.assert_allclose(of_way, expected, rtol=2e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_a_count():
    """In two of six steps, a token is outside the vocabulary, so its embedding is NaN."""
    config = tiny_config("softmax", num_layers=1)
    run = run_on(config, 2, optimizer=optax.adam(0.1), log_every=4, accumulation=2)
    train_step = make_train_step(run)
    batches = [random_batch(8, seed) for seed in range(6)]
    for bad in (1, 3):
        batches[bad].tokens[5, 0] = 255
    states, seen = init_states(run), []
    for i, batch in enumerate(batches):
        before = jax.device_get(states)
        states, sums = train_step(states, sharded(run, batch))
        after = jax.device_get(states)
        assert after.step == [i + 1]
        same = jax.tree.map(np.array_equal, before.params, after.params)
        assert any(jax.tree.leaves(same)) == all(jax.tree.leaves(same)) == (i in (1, 3))
        same = jax.tree.map(np.array_equal, before.opt_state, after.opt_state)
        assert all(jax.tree.leaves(same)) == (i in (1, 3))
        assert np.isfinite(sums["loss"]).all()
        seen.append([int(sums[name][0]) for name in ("examples", "skipped", "first_skipped")])
    assert seen == [[8, 0, 0], [8, 1, 2], [16, 1, 2], [16, 2, 2], [8, 0, 0], [16, 0, 0]]


@pytest.mark.slow
def test_seeds_and_microbatches_change_nothing(monkeypatch):
    """Two seeds in one program, with microbatches and on two devices, train as each does alone.

    They agree up to rounding.
    """
    config = tiny_config("skyformer", num_layers=1)
    batches = [[random_batch(16, 10 * number + seed) for seed in (0, 1)] for number in (0, 1)]

    def trained(seed, num_seeds, batches, num_devices=1, accumulation=1):
        """Trains num_seeds seeds in one program on batches[step][seed]; returns the states."""
        config.update({"seed": seed, "num_seeds": num_seeds})
        settings = {"log_every": 2, "accumulation": accumulation}
        run = run_on(config, num_devices, optimizer=optax.sgd(1.0), **settings)
        states, train_step = init_states(run), make_train_step(run)
        for of_seeds in batches:
            states, sums = train_step(states, sharded(run, *of_seeds))
            jax.block_until_ready(sums)
        return jax.device_get(states)

    first, second = (
        take(trained(7 + i, 1, [[of_seeds[i]] for of_seeds in batches]), 0) for i in (0, 1)
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.params, second.params)
    assert min(jax.tree.leaves(moved)) > 1e-3

    monkeypatch.setattr(step, "_CPU_TOKENS", 200)  # 4 examples at a time if accumulation=0
    for options in ({"accumulation": 0}, {"accumulation": 2, "num_devices": 2}):
        states = trained(7, 2, batches, **options)
        for i, expected in enumerate((first, second)):
            mine = take(states, i)
            assert mine.step == 2 and mine.sums["examples"] == 32
            np.testing.assert_array_equal(mine.rng, expected.rng)
            np.testing.assert_allclose(mine.sums["loss"], expected.sums["loss"], rtol=1e-5)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
                mine.params,
                expected.params,
            )


@pytest.mark.slow
def test_sums_start_anew_after_a_log():
    config = tiny_config("kernelized", num_layers=1)
    run = run_on(config, optimizer=optax.sgd(0.0), log_every=3)
    states, train_step = init_states(run), make_train_step(run)
    counts = []
    for seed in range(5):
        states, sums = train_step(states, sharded(run, random_batch(8, seed)))
        counts.append(int(sums["examples"][0]))
    assert counts == [8, 16, 24, 8, 16]


@pytest.mark.slow
def test_predictions_do_not_depend_on_batch_size_or_devices_or_parts(monkeypatch):
    config = tiny_config("skyformer")
    variables = jax.device_get(init_states(run_on(config)).variables)
    some = random_batch(37)
    rows = zip(some.tokens, some.length, strict=True)
    examples = from_sequences([row[:length] for row, length in rows], some.label)
    for rng in (None, jax.random.key(5)):
        monkeypatch.undo()
        results = []
        # Random draws depend on the padded length, so no buckets with an rng.
        shorter = () if rng is not None else (16, 32)
        for num_devices, batch_size, buckets in ((1, 37, ()), (1, 5, shorter), (8, 16, ())):
            run = run_on(config, num_devices)
            (logits,) = evaluation.predict(
                run,
                make_predict_step(run),
                variables,
                examples,
                batch_size=batch_size,
                rng=rng,
                buckets=buckets,
            )
            assert logits.shape == (37, 10)
            results.append(logits)
            monkeypatch.setattr(step, "_CPU_TOKENS", 100)
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "data", "seq"),
    [
        ("learned", 2, 4),
        pytest.param("axial", 1, 8, marks=pytest.mark.slow),
        pytest.param("sinusoidal", 8, 1, marks=pytest.mark.slow),
        pytest.param("sinusoidal_2d", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_leaving_zeros_out_is_masking_them(positions, data, seq):
    """Kernelized attention gives the same logits for masked zeros as without them, sharded too."""
    config = tiny_config("kernelized", num_layers=1, positions=positions, max_length=64)
    rng = np.random.default_rng(0)
    values = np.where(rng.random((16, 48)) < 0.5, 0, rng.integers(1, 16, (16, 48)))
    examples = from_sequences(list(values.astype(np.uint8)), np.zeros(16))
    masked = run_on(config)
    masked.config.data.mask_zeros = True
    variables = jax.tree.map(  # learned positions are too small at first to be seen
        lambda x: 20 * x, jax.device_get(init_states(masked).variables)
    )
    (expected,) = evaluation.predict(masked, make_predict_step(masked), variables, examples)
    left_out = run_on(config, data, seq)
    for given, same in ((examples.drop_below(1), True), (examples, False)):
        (logits,) = evaluation.predict(left_out, make_predict_step(left_out), variables, given)
        assert np.allclose(logits, expected, rtol=1e-4, atol=1e-4) == same
    without = dataclasses.replace(examples.drop_below(1), positions=None)
    (logits,) = evaluation.predict(left_out, make_predict_step(left_out), variables, without)
    assert not np.allclose(logits, expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("examples", "tokens", "accumulation", "parts"),
    [
        (32, (2048,), 0, 16),
        (16, (4096,), 0, 16),
        (16, (2, 4096), 0, 16),
        (256, (1024,), 0, 64),
        (128, (48,), 0, 2),
        (37, (1024,), 0, 37),  # a prime number of examples
        (7, (48,), 0, 1),
        (32, (2048,), 4, 4),
        (32, (2048,), 1, 1),
    ],
)
def test_microbatches_have_the_tokens_that_suit_a_cpu(examples, tokens, accumulation, parts):
    batch = Batch(np.zeros((examples, *tokens), np.uint8), np.zeros(examples), np.zeros(examples))
    run = run_on(tiny_config(), accumulation=accumulation)
    microbatches, keys = step._microbatches(run, batch, None)
    assert keys is None
    assert microbatches.tokens.shape == (parts, examples // parts, *tokens)
    assert microbatches.label.shape == (parts, examples // parts)
    others = step.num_microbatches(accumulation, "tpu", examples, int(np.prod(tokens)))
    assert others == (accumulation or 1)


def test_what_is_fixed_stays_through_training_and_checkpoints(tmp_path):
    """With features other than those at init, Performer would be silently wrong at evaluation."""
    config = tiny_config("performer", num_layers=1)
    run = run_on(config, 2, optimizer=optax.sgd(1.0), log_every=2)
    states = init_states(run)
    before = jax.device_get(states.fixed)
    assert len(jax.tree.leaves(before)) == 1
    states, _ = make_train_step(run)(states, sharded(run, random_batch(16)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(states.fixed), before)
    meta = {"step": 1, "validation": None}
    with checkpoints.open_saver(tmp_path) as save:
        save(take(jax.device_get(states), 0), meta)
    restored, _ = checkpoints.restore(tmp_path, 1, state_spec(run))
    jax.tree.map(np.testing.assert_array_equal, restored.fixed, take(before, 0))
