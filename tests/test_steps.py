"""The training step: schedule, devices, determinism, and the order of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_model import tiny_config
from tiny_data import from_sequences

from skyformer_jax import attention, models
from skyformer_jax.data.batches import Batch, evaluation_batches, make_batch, stacked
from skyformer_jax.data.examples import Examples
from skyformer_jax.training import checkpoints, evaluation, steps
from skyformer_jax.training import mesh as meshes


def mesh_of(num_devices):
    return meshes.make_mesh(num_devices, devices=jax.devices()[:num_devices])


def random_batch(count, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rng.integers(1, 16, (count, 48), np.uint8),
        rng.integers(1, 48, count, np.int32),
        rng.integers(0, 10, count, np.int32),
    )


READING = steps.Reading()


def sharded(batch, mesh):
    """The batch of one step of one seed, as the compiled step takes it."""
    batch = jax.tree.map(lambda x: x[None, None], batch)
    return meshes.shard_batch(batch, mesh, axis=2)


def one_state(model, optimizer):
    return steps.init_states([0], model, optimizer, (48,))


def two_steps(config, data, seq, backend, accumulation):
    """Parameters and sums after two steps by SGD, whose scale a wrong gradient changes."""
    mesh = meshes.make_mesh(data, seq, devices=jax.devices()[: data * seq])
    model = models.build_model(config, axis_name=meshes.sequence_axis(mesh))
    optimizer = optax.sgd(1.0)
    states = steps.init_states([0], model, optimizer, (48,), True)
    step = steps.make_train_step(
        model, optimizer, mesh, 2, READING, accumulation, (48,), backend=backend
    )
    for seed in range(2):
        batch = random_batch(16, seed)  # parts of 12 or 6 positions hold nothing but padding
        states, sums = step(states, sharded(batch._replace(length=batch.length // 3 + 1), mesh))
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
    """Data and sequences divided, both back ends, in parts or not: as one device, dropout and all.

    The dropout, the landmarks, padding and every attention's own random draws are those of a place
    in the batch and in the sequence.
    """
    config = tiny_config(name, num_layers=1)
    params, sums = two_steps(config, 1, 1, "shard_map", 1)
    model, optimizer = models.build_model(config), optax.sgd(1.0)
    initial = one_state(model, optimizer).params
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
    """The token of one example is none of the vocabulary's: its embedding is NaN."""
    model, optimizer = models.build_model(tiny_config("softmax", num_layers=1)), optax.adam(0.1)
    mesh = mesh_of(2)
    step = steps.make_train_step(model, optimizer, mesh, 4, READING, accumulation=2)
    batches = [random_batch(8, seed) for seed in range(6)]
    for bad in (1, 3):
        batches[bad].tokens[5, 0] = 255
    states, seen = one_state(model, optimizer), []
    for i, batch in enumerate(batches):
        before = jax.device_get(states)
        states, sums = step(states, sharded(batch, mesh))
        after = jax.device_get(states)
        assert after.step == [i + 1]
        same = jax.tree.map(np.array_equal, before.params, after.params)
        assert any(jax.tree.leaves(same)) == all(jax.tree.leaves(same)) == (i in (1, 3))
        same = jax.tree.map(np.array_equal, before.opt_state, after.opt_state)
        assert all(jax.tree.leaves(same)) == (i in (1, 3))
        assert np.isfinite(sums["loss"]).all()
        seen.append([int(sums[name][0]) for name in ("examples", "skipped", "first_skipped")])
    assert seen == [[8, 0, 0], [8, 1, 2], [16, 1, 2], [16, 2, 2], [8, 0, 0], [16, 0, 0]]


def test_parts_calls_and_seeds_change_nothing(monkeypatch):
    """Two steps of two seeds in one call, in parts, on devices: each as by itself, to rounding."""
    model, optimizer = models.build_model(tiny_config("skyformer", num_layers=1)), optax.sgd(1.0)
    batches = [[random_batch(16, 10 * step + seed) for step in (0, 1)] for seed in (0, 1)]

    def call(seeds, batches, num_devices=1, accumulation=1):
        """States after calls of one program, with batches [steps, seeds, batch] each."""
        mesh = mesh_of(num_devices)
        step = steps.make_train_step(model, optimizer, mesh, 2, READING, accumulation)
        states = steps.init_states(seeds, model, optimizer, (48,))
        for batch in batches:
            states, sums = step(states, meshes.shard_batch(batch, mesh, axis=2))
            jax.block_until_ready(sums)
        return jax.device_get(states)

    first, second = (
        steps.take(call([seed], [jax.tree.map(lambda x: x[None, None], b) for b in of_seed]), 0)
        for seed, of_seed in zip((7, 8), batches, strict=True)
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.params, second.params)
    assert min(jax.tree.leaves(moved)) > 1e-3

    together = stacked([iter(of_seed) for of_seed in batches], 2)
    monkeypatch.setattr(steps, "_CPU_TOKENS", 200)  # parts of 4 examples where none are asked for
    for options in ({}, {"accumulation": 2, "num_devices": 2}):
        states = call([7, 8], [together], **options)
        for i, expected in enumerate((first, second)):
            mine = steps.take(states, i)
            assert mine.step == 2 and mine.sums["examples"] == 32
            np.testing.assert_array_equal(mine.rng, expected.rng)
            np.testing.assert_allclose(mine.sums["loss"], expected.sums["loss"], rtol=1e-5)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
                mine.params,
                expected.params,
            )


def test_sums_start_anew_after_a_log():
    config = tiny_config("kernelized", num_layers=1)
    model, optimizer, mesh = models.build_model(config), optax.sgd(0.0), mesh_of(1)
    state = one_state(model, optimizer)
    step = steps.make_train_step(model, optimizer, mesh, 3, READING)
    counts = []
    for seed in range(5):
        state, sums = step(state, sharded(random_batch(8, seed), mesh))
        counts.append(int(sums["examples"][0]))
    assert counts == [8, 16, 24, 8, 16]


def test_predictions_do_not_depend_on_batch_size_or_devices_or_parts(monkeypatch):
    config = tiny_config("skyformer")
    model = models.build_model(config)
    variables = one_state(model, optax.sgd(1.0)).variables
    some = random_batch(37)
    rows = zip(some.tokens, some.length, strict=True)
    examples = from_sequences([row[:length] for row, length in rows], some.label)
    for rng in (None, jax.random.key(5)):
        monkeypatch.undo()
        results = []
        # What is drawn at random depends on the padded length.
        shorter = () if rng is not None else (16, 32)
        for num_devices, batch_size, buckets in ((1, 37, ()), (1, 5, shorter), (8, 16, ())):
            mesh = mesh_of(num_devices)
            predict_step = steps.make_predict_step(model, mesh, READING)
            batches = evaluation_batches(examples, batch_size, 48, buckets=buckets)
            logits = evaluation.predict(predict_step, variables, batches, mesh, rng)[0]
            assert logits.shape == (37, 10)
            results.append(logits)
            monkeypatch.setattr(steps, "_CPU_TOKENS", 100)
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-5)


def test_schedule_is_the_one_cycle_of_the_paper():
    """Against the definition: linear to the peak in warmup_steps, linear down to peak / 25e4."""
    config = tiny_config()
    config.train.update({"learning_rate": 2e-4, "warmup_steps": 80, "num_steps": 1000})
    schedule = steps.learning_rate_schedule(config)
    for step, expected in (
        (0, 2e-4 / 25),
        (40, (2e-4 / 25 + 2e-4) / 2),
        (80, 2e-4),
        (540, (2e-4 + 2e-4 / 25e4) / 2),
        (1000, 2e-4 / 25e4),
    ):
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-4)
    config.train.warmup_steps = 0
    np.testing.assert_allclose(steps.learning_rate_schedule(config)(0), 2e-4, rtol=1e-6)


def test_gradients_are_clipped_by_value():
    config = tiny_config()
    optimizer = steps.make_optimizer(config)
    params = {"w": jnp.ones(3)}
    small, large = ({"w": jnp.array([1.0, -1.0, 1.0]) * size} for size in (1, 100))
    updates = [optimizer.update(g, optimizer.init(params), params)[0]["w"] for g in (small, large)]
    np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize("documents", [1, 2])
def test_devices_read_the_batches_that_the_host_makes(documents):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 12 * documents)
    sequences = [rng.integers(1, 256, length) for length in lengths]
    examples = Examples(
        np.concatenate(sequences).astype(np.uint8),
        np.concatenate([[0], np.cumsum(lengths)]),
        rng.integers(0, 3, 12).astype(np.int32),
        num_documents=documents,
    )
    table = steps.make_table(examples, mesh_of(2))
    shape = (9,) if documents == 1 else (2, 9)
    rows = rng.integers(0, 12, (3, 2, 4))
    read = jax.jit(steps.read_batch, static_argnums=2)(table, rows, shape)
    for i in np.ndindex(3, 2):
        expected = make_batch(examples, rows[i], 9)
        mine = steps.take(read, i)
        np.testing.assert_array_equal(mine.label, expected.label)
        np.testing.assert_array_equal(mine.length, expected.length)
        assert mine.tokens.shape == expected.tokens.shape
        real = np.arange(9) < expected.length[..., None]
        np.testing.assert_array_equal(mine.tokens[real], expected.tokens[real])


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
def test_parts_have_the_tokens_that_suit_a_cpu(examples, tokens, accumulation, parts):
    batch = Batch(np.zeros((examples, *tokens), np.uint8), np.zeros(examples), np.zeros(examples))
    (split, keys) = steps._in_parts(batch, None, accumulation)
    assert keys is None
    assert split.tokens.shape == (parts, examples // parts, *tokens)
    assert split.label.shape == (parts, examples // parts)


def test_score_and_interval():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = evaluation.score(logits, np.array([0, 2]))
    assert scores["accuracy"] == 0.5
    expected = -np.log(probabilities[[0, 1], [0, 2]]).mean()
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-12)
    low, high = evaluation.wilson_interval(0.5, 100)
    np.testing.assert_allclose([low, high], [0.4038, 0.5962], atol=1e-4)  # published tables


def test_what_is_fixed_stays_through_training_and_checkpoints(tmp_path):
    """Performer's features: another than those at init would be silently wrong at evaluation."""
    config = tiny_config("performer", num_layers=1)
    model, optimizer, mesh = models.build_model(config), optax.sgd(1.0), mesh_of(2)
    state = one_state(model, optimizer)
    before = jax.device_get(state.fixed)
    assert len(jax.tree.leaves(before)) == 1
    step = steps.make_train_step(model, optimizer, mesh, 2, READING)
    state, _ = step(state, sharded(random_batch(16), mesh))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.fixed), before)
    meta = {"step": 1, "validation": None}
    with checkpoints.open_saver(tmp_path) as save:
        save(steps.take(jax.device_get(state), 0), meta)
    abstract = steps.abstract_state(config, model, optimizer)
    restored, _ = checkpoints.restore(tmp_path, 1, abstract)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(restored.fixed), steps.take(before, 0)
    )
