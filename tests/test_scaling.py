"""Traffic between devices, read from compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from run_on import run_on
from scripts import import_script
from test_model import tiny_config

from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.timing import lower_train_step, random_batch
from skyformer_jax.attention import kernelized_attention, skyformer_attention
from skyformer_jax.training.state import state_spec

long_sequences = import_script("benchmarks.long_sequences")


def compiled_step(length, parts=8, **changes):
    """Compiles a training step of two sequences, each sharded over `parts` devices.

    Returns:
      The state's spec and the compiled step.
    """
    config = tiny_config("skyformer", num_layers=1, max_length=length, **changes)
    train = {"batch_size": 2, "log_every": 10, "accumulation": 1}
    run = run_on(config, 1, parts, optimizer=optax.sgd(1.0), **train)
    return state_spec(run), lower_train_step(run, random_batch(run)).compile()


def sent_by_gradients(attend, length, parts):
    """The collectives of an attention's gradients, on a sequence sharded over `parts` devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:parts]), ("seq",))

    def gradients(query, key, value):
        def loss(*arrays):
            return (attend(*arrays) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    along = P(None, "seq")
    function = jax.shard_map(gradients, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    rows = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    return collectives(jax.jit(function).lower(rows, rows, rows).compile().as_text())


def test_what_skyformer_sends_does_not_grow_with_the_length():
    """Devices exchange landmarks and their context, and in the backward pass their gradients."""

    def attend(*arrays):
        return skyformer_attention(
            *arrays, num_landmarks=16, rng=jax.random.key(0), axis_name="seq"
        )

    sent = sent_by_gradients(attend, 256, 8)
    assert sent_by_gradients(attend, 1024, 8) == sent
    arrays = 4 * 4 * 16 * 2 * 8  # in bytes
    assert arrays <= sent["all-reduce"]["bytes"] < 1.1 * arrays
    assert set(sent) == {"all-reduce", "all-gather"}


def causal_skyformer(*arrays):
    """Causal Skyformer with fixed landmarks and a convolution over three positions."""
    landmarks = jnp.arange(256, dtype=jnp.float32).reshape(16, 2, 8) / 256
    kernel = jnp.ones((3, 2, 8), jnp.float32)
    options = {"landmarks": landmarks, "conv_kernel": kernel, "is_causal": True}
    return skyformer_attention(*arrays, **options, axis_name="seq")


def test_what_causal_skyformer_sends_does_not_grow_with_the_length():
    """Each device sends its sums, its last segment and the values that the next one convolves."""
    sent = sent_by_gradients(causal_skyformer, 2048, 8)
    assert sent_by_gradients(causal_skyformer, 8192, 8) == sent
    sums = 4 * 2 * 16 * 8  # bytes per device
    assert sum(x["bytes"] for x in sent.values()) < 20 * sums


@pytest.mark.slow
def test_what_a_step_sends_does_not_grow_with_the_length():
    """Holds for a whole training step of Skyformer, although its memory grows."""
    state, short = compiled_step(256, positions="sinusoidal")
    _, long = compiled_step(1024, positions="sinusoidal")
    sent = collectives(short.as_text())
    assert collectives(long.as_text()) == sent
    # At least the gradients are sent, and a table of positions would be among them.
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x["bytes"] for x in sent.values()) > 4 * num_parameters
    assert "collective-permute" not in sent
    grown = long.memory_analysis().temp_size_in_bytes
    assert grown > 2 * short.memory_analysis().temp_size_in_bytes


def test_what_a_ring_sends_is_counted_by_its_turns():
    """Exact attention's traffic grows: keys and values pass all devices, forward and backward."""

    def attend(*arrays):
        return kernelized_attention(*arrays, axis_name="seq")

    for length in (64, 128):
        part = 4 * (length // 4) * 2 * 8
        # Forward, keys and values circulate; backward, these and their gradients.
        expected = {"collective-permute": {"count": 4 * (2 + 4), "bytes": 4 * (2 + 4) * part}}
        assert sent_by_gradients(attend, length, 4) == expected


def test_bytes_of_results():
    text = """
%body (x: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %r = (f32[2,3]{1,0}, bf16[5]{0}) all-reduce(%a, %b), to_apply=%sum
}
ENTRY %main (p: f32[2]) -> pred[] {
  %w = (s32[], f32[2,3]) while(%t), condition=%c, body=%body, backend_config={TRIPS}
  %g = pred[8,4]{1,0} all-gather(%p), dimensions={0}
}
%c (x: s32[]) -> pred[] {
  %k = pred[] compare(%x, %y)
}
"""
    trips = '{"known_trip_count":{"n":"3"}}'
    assert collectives(text.replace("{TRIPS}", trips)) == {
        "all-reduce": {"count": 3, "bytes": 3 * (24 + 10)},
        "all-gather": {"count": 1, "bytes": 32},
    }
    with pytest.raises(ValueError, match="an unknown number of turns"):
        collectives(text.replace("{TRIPS}", "{}"))


@pytest.mark.slow
def test_the_script_for_long_sequences_measures():
    config = long_sequences.make_config(2048, 3)
    rows = [long_sequences.measure(config, parts, 3) for parts in (1, 8)]
    np.testing.assert_allclose(rows[1]["loss"], rows[0]["loss"], rtol=1e-3)
    assert rows[0]["temporaries_bytes"] > 3 * rows[1]["temporaries_bytes"]
    tokens, length, label = long_sequences.make_batch(4096, 0)
    assert tokens.shape == (1, 2, 4096) and (length == 4096).all()
    np.testing.assert_allclose((tokens > 127).mean(axis=-1)[0], [0.3, 0.7], atol=0.05)
    np.testing.assert_array_equal(label[0], [0, 1])
