"""Examples in memory, their order, and batches that cover every example exactly once."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_data import from_sequences

from skyformer_jax.data import batches
from skyformer_jax.data.examples import Examples
from skyformer_jax.data.tokenizer import BYTES, IDENTITY
from skyformer_jax.errors import UserError


def random_examples(count, longest=40, documents=1, seed=0, tokenizer=IDENTITY):
    """Returns Examples and their content as a list of (documents, label)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count * documents)
    texts = [rng.integers(0, 256, n, np.uint8) for n in lengths]
    labels = rng.integers(0, 3, count)
    examples = Examples(
        np.concatenate(texts),
        np.concatenate([[0], np.cumsum(lengths)]),
        labels.astype(np.int32),
        num_documents=documents,
        tokenizer=tokenizer,
    )
    plain = [
        ([texts[i * documents + j] for j in range(documents)], int(labels[i])) for i in range(count)
    ]
    return examples, plain


@pytest.mark.parametrize("documents", [1, 2])
def test_examples_are_a_sequence(documents):
    examples, plain = random_examples(17, documents=documents, tokenizer=BYTES)
    assert len(examples) == 17
    for i in (0, 5, 16, -1):
        example, (texts, label) = examples[i], plain[i]
        tokens = example["tokens"] if documents == 2 else (example["tokens"],)
        for got, text in zip(tokens, texts, strict=True):
            np.testing.assert_array_equal(got, text.astype(int) + 1)  # byte 255 is token 256
        assert example["label"] == label
    with pytest.raises(IndexError, match="17"):
        examples[17]
    np.testing.assert_array_equal(
        examples.lengths, [[len(text) for text in texts] for texts, _ in plain]
    )
    assert len(list(examples)) == 17


def test_cut_select_and_follow():
    examples, plain = random_examples(23, documents=2)
    cut = examples.cut(7)
    for i, (texts, _) in enumerate(plain):
        for got, text in zip(cut[i]["tokens"], texts, strict=True):
            np.testing.assert_array_equal(got, text[:7])
    assert examples.cut(40) is examples
    selected = examples.select(examples.values != 3)
    for i, (texts, _) in enumerate(plain):
        for got, text in zip(selected[i]["tokens"], texts, strict=True):
            np.testing.assert_array_equal(got, text[text != 3])
    both = cut.followed_by(examples)
    assert len(both) == 46 and both.checksum() != examples.followed_by(cut).checksum()
    for i in range(23):
        for j, part in ((i, cut), (23 + i, examples)):
            for a, b in zip(both[j]["tokens"], part[i]["tokens"], strict=True):
                np.testing.assert_array_equal(a, b)
            assert both[j]["label"] == part[i]["label"]


@pytest.mark.parametrize("threshold", [1, 100])
def test_values_that_are_left_keep_their_positions(threshold):
    """A batch without small values has each other value at its position, also after a cut."""
    rng = np.random.default_rng(0)
    images = np.where(rng.random((9, 40)) < 0.6, 0, rng.integers(0, 256, (9, 40))).astype(np.uint8)
    images[3] = 0  # nothing is left of it
    examples = from_sequences(list(images), np.arange(9))
    dropped = examples.drop_below(threshold)
    images = np.where(images < threshold, 0, images)
    rows = np.array([4, 3, 8])
    batch = batches.make_batch(dropped, rows, 40)
    assert batch.positions.dtype == np.int32 and batch.length[1] == 0
    for place, row in enumerate(rows):
        image, length = np.zeros(40, np.uint8), batch.length[place]
        image[batch.positions[place, :length]] = batch.tokens[place, :length]
        np.testing.assert_array_equal(image, images[row])
        assert (np.diff(batch.positions[place, :length]) > 0).all()
    first = batches.make_batch(dropped.cut(5), rows, 5)
    np.testing.assert_array_equal(first.positions[0], np.flatnonzero(images[4])[:5])
    pairs = dataclasses.replace(examples.cut(40), num_documents=3).drop_below(1)
    assert batches.make_batch(pairs, np.array([1, 2]), 40).positions.shape == (2, 3, 40)


def test_shrunk_is_the_mean_of_squares():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8), np.uint8)
    examples = from_sequences(list(images.reshape(5, 64)), np.zeros(5))
    shrunk = examples.shrunk(2)
    for i in range(5):
        expected = [
            images[i, y : y + 2, x : x + 2].mean() for y in range(0, 8, 2) for x in range(0, 8, 2)
        ]
        np.testing.assert_array_equal(shrunk[i]["tokens"], np.rint(expected))
    assert examples.shrunk(1) is examples
    with pytest.raises(UserError, match="must divide 8"):
        examples.shrunk(3)


def test_checksum_depends_on_everything():
    base = [np.array(x, np.uint8) for x in ([1, 2], [3])]
    sums = {
        from_sequences(sequences, labels).checksum()
        for sequences, labels in (
            (base, [0, 1]),
            (base, [1, 0]),
            (base[::-1], [0, 1]),
            ([np.array([1], np.uint8), np.array([2, 3], np.uint8)], [0, 1]),
            ([*base, np.array([1], np.uint8)], [0, 1, 0]),
        )
    }
    moved = (np.array([x], np.uint8) for x in ([0, 1], [1, 0]))
    sums |= {from_sequences([x[0]], [0]).drop_below(1).checksum() for x in moved}
    assert len(sums) == 7
    assert from_sequences(base, [0, 1]).checksum() == from_sequences(base, [0, 1]).checksum()


def test_tokenizers_shift_by_their_offset():
    values = np.array([[0, 3], [255, 254]], np.uint8)
    for tokenizer, expected in ((BYTES, values + 1.0), (IDENTITY, values)):
        tokens = tokenizer(values)
        np.testing.assert_array_equal(tokens, expected)
        assert tokens.dtype == np.int32 and tokens.max() < tokenizer.vocab_size
        on_device = tokenizer(jnp.asarray(values))
        assert isinstance(on_device, jax.Array) and on_device.dtype == np.int32
        np.testing.assert_array_equal(on_device, tokens)


@pytest.mark.parametrize("documents", [1, 2])
def test_batches_are_padded(documents):
    examples, plain = random_examples(9, documents=documents)
    rows = np.array([4, 0, 8])
    batch = batches.make_batch(examples, rows, 50)
    assert batch.tokens.dtype == np.uint8
    assert batch.tokens.shape == ((3, 50) if documents == 1 else (3, 2, 50))
    tokens, lengths = batch.tokens.reshape(3, -1, 50), batch.length.reshape(3, -1)
    for place, row in enumerate(rows):
        texts, label = plain[row]
        assert batch.label[place] == label
        for j, text in enumerate(texts):
            assert lengths[place, j] == len(text)
            np.testing.assert_array_equal(tokens[place, j], np.pad(text, (0, 50 - len(text))))


@pytest.mark.parametrize("sorted_by_length", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (97, 8), (3, 8), (640, 5)])
def test_every_example_once_an_epoch(count, batch_size, sorted_by_length):
    """Over whole windows and epochs all examples are equally frequent.

    Unless batches are sorted by length, every epoch is a permutation, and epochs differ.
    """
    lengths = np.random.default_rng(0).integers(1, 100, count) if sorted_by_length else None
    steps = 64 * count  # a whole number of windows and of epochs
    rows = batches.training_rows(count, batch_size, seed=1, lengths=lengths)
    stream = np.concatenate([next(rows) for _ in range(steps)])
    np.testing.assert_array_equal(np.bincount(stream), np.full(count, steps * batch_size // count))
    if not sorted_by_length:
        epochs = stream.reshape(-1, count)
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert not np.array_equal(epochs[0], epochs[1])


def test_an_epoch_of_batches_by_length_holds_every_example_once():
    """Holds for every epoch if an epoch is a whole number of windows."""
    count, batch_size = 64 * 6, 6
    lengths = np.random.default_rng(0).integers(1, 1000, count)
    rows = batches.training_rows(count, batch_size, seed=3, lengths=lengths)
    epochs = np.array([next(rows) for _ in range(3 * 64)]).reshape(3, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    spread = np.ptp(lengths[epochs[0].reshape(-1, batch_size)], axis=1)
    assert np.median(spread) < 50  # out of 1000: batches hold similar lengths
    order = lengths[epochs[0].reshape(-1, batch_size)].mean(axis=1)
    assert (np.diff(order) < 0).mean() > 0.3  # but batches are not in order of length


@pytest.mark.parametrize("by_length", [False, True])
def test_balanced_batches_have_each_class_in_its_share(by_length):
    count, batch_size, num_batches = 3000, 16, 128
    rng = np.random.default_rng(0)
    labels = rng.choice(3, count, p=[0.2, 0.3, 0.5])
    lengths = rng.integers(1, 1000, count) if by_length else None

    def rows(first_step=0, **options):
        stream = batches.training_rows(
            count, batch_size, seed=5, first_step=first_step, lengths=lengths, **options
        )
        return np.array([next(stream) for _ in range(num_batches - first_step)])

    def counts(rows):
        return np.array([np.bincount(labels[batch], minlength=3) for batch in rows])

    balanced = rows(labels=labels)
    np.testing.assert_array_equal(rows(70, labels=labels), balanced[70:])
    assert len(np.unique(balanced)) == balanced.size  # within the first epoch
    for window in balanced.reshape(-1, 64, batch_size):
        shares = np.bincount(labels[window].ravel()) / window.size
        assert abs(counts(window) - batch_size * shares).max() < 2
    assert np.ptp(counts(rows())[:, 2]) > 6
    if by_length:
        assert np.mean([np.ptp(lengths[batch]) for batch in balanced]) < 100


@pytest.mark.parametrize(
    "options", [{}, {"buckets": (8, 24)}, {"sample_length": 9, "sample_steps": 67}]
)
def test_resuming_reads_on_exactly(options):
    examples, _ = random_examples(50)

    def read(first_step, count):
        stream = batches.training_batches(examples, 4, 40, seed=2, first_step=first_step, **options)
        return [next(stream) for _ in range(count)]

    whole = read(0, 200)
    for first in (1, 7, 63, 64, 65, 130):
        for a, b in zip(read(first, 5), whole[first : first + 5], strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)  # no positions are no leaves


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_each_batch(processes):
    """The processes' shards, concatenated in order, equal a single process's batches."""
    examples, _ = random_examples(30)
    options = {"seed": 5, "buckets": (16,), "sample_length": 20, "sample_steps": 50}
    whole = batches.training_batches(examples, 8, 40, **options)
    streams = [
        batches.training_batches(
            examples, 8, 40, shards=batches.BatchShards((i,), processes), **options
        )
        for i in range(processes)
    ]
    for step in range(100):
        expected = next(whole)
        assert (expected.positions is None) == (step >= 50)
        shards = (next(stream) for stream in streams)
        together = jax.tree.map(lambda *parts: np.concatenate(parts), *shards)
        jax.tree.map(np.testing.assert_array_equal, together, expected)


def test_the_stages_of_a_curriculum_follow_each_other():
    """Each step has the batch of its own stage, also in a run that begins at this step."""
    easy, hard, own = (random_examples(count, seed=count)[0] for count in (50, 30, 40))
    stages = (batches.Stage(easy, 7), batches.Stage(hard, 90), batches.Stage(own))
    options = {"seed": 3, "buckets": (20,), "balanced": True}

    def take(count, stream):
        return [batch for batch, _ in zip(stream, range(count), strict=False)]

    whole = take(120, batches.staged_batches(stages, 4, 40, **options))
    for examples, first, end in ((easy, 0, 7), (hard, 7, 90), (own, 90, 120)):
        expected = batches.training_batches(examples, 4, 40, first_step=first, **options)
        jax.tree.map(np.testing.assert_array_equal, whole[first:end], take(end - first, expected))
    for first in (3, 7, 8, 89, 90, 100):
        rest = batches.staged_batches(stages, 4, 40, first_step=first, **options)
        jax.tree.map(np.testing.assert_array_equal, whole[first:], take(120 - first, rest))
    assert batches.checksum_of_stages(stages[2:]) == own.checksum()
    sums = {batches.checksum_of_stages(some) for some in (stages, stages[1:], stages[::-1])}
    assert len(sums) == 3


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("drop_black", [False, True])
def test_drawn_tokens_are_real_and_keep_their_places(documents, drop_black):
    """They are different tokens of the document, in its order, and each is as likely as another."""
    examples = random_examples(12, documents=documents)[0]
    if drop_black:
        examples = examples.drop_below(1)
    whole = batches.make_batch(examples, np.arange(12), 40)
    positions = np.broadcast_to(np.arange(40), whole.tokens.shape)
    if drop_black:
        positions = whole.positions
    rng = np.random.default_rng(0)
    counts = np.zeros(whole.tokens.shape)
    for _ in range(300):
        drawn = batches.sampled(whole, 10, rng)
        assert drawn.tokens.shape == drawn.positions.shape == (*whole.length.shape, 10)
        assert drawn.tokens.dtype == np.uint8 and drawn.positions.dtype == np.int32
        np.testing.assert_array_equal(drawn.length, np.minimum(whole.length, 10))
        np.testing.assert_array_equal(drawn.label, whole.label)
        for i in np.ndindex(whole.length.shape):
            at, n = drawn.positions[i][: drawn.length[i]], whole.length[i]
            assert (np.diff(at) > 0).all()
            place = np.searchsorted(positions[i][:n], at)
            np.testing.assert_array_equal(positions[i][place], at)
            np.testing.assert_array_equal(whole.tokens[i][place], drawn.tokens[i][: len(at)])
            counts[i][place] += 1
    real = np.arange(40) < whole.length[..., None]
    expected = 300 * np.minimum(1, 10 / np.maximum(whole.length, 1))[..., None]
    assert (abs(counts - expected)[real] < 5 * np.sqrt(expected)[..., :1].max()).all()
    assert not counts[~real].any()
    few = batches.sampled(whole, 90, rng)  # more than there are
    real = np.arange(40) < few.length[..., None]
    np.testing.assert_array_equal(np.where(real, few.tokens, 0), np.where(real, whole.tokens, 0))


PROCESS = """
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from skyformer_jax.data.batches import training_batches
from skyformer_jax.training.mesh import make_mesh, local_shards, shard_batch
from test_batches import random_examples

jax.config.update("jax_num_cpu_devices", 2)
address, index, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=index)
examples, _ = random_examples(30)
mesh = make_mesh()
assert mesh.size == 4
shards = local_shards(mesh)
assert shards == ((2 * index, 2 * index + 1), 4)
stream = training_batches(examples, 8, 40, seed=5, shards=shards)
seen = []
for _ in range(15):
    batch = shard_batch(next(stream), mesh)
    assert batch.tokens.shape == (8, 40)
    seen.append(multihost_utils.process_allgather(batch, tiled=True))
fields = ("tokens", "length", "label")
arrays = {name: np.stack([getattr(batch, name) for batch in seen]) for name in fields}
np.savez(out, **arrays)
"""


def test_two_real_processes_see_one_stream(tmp_path):
    """Two processes under jax.distributed get the same global batches as a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "process.py").write_text(PROCESS)
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "process.py", address, str(i), tmp_path / f"{i}.npz"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    examples, _ = random_examples(30)
    stream = batches.training_batches(examples, 8, 40, seed=5)
    expected = [next(stream) for _ in range(15)]
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as seen:
            for name in ("tokens", "length", "label"):
                np.testing.assert_array_equal(
                    seen[name], [getattr(batch, name) for batch in expected]
                )


def test_a_batch_of_each_seed_is_stacked():
    examples, _ = random_examples(30, documents=2)
    one, two = (
        next(batches.training_batches(examples, 4, 40, seed=seed, buckets=())) for seed in (0, 1)
    )
    stacked = batches.stack_batches([one, two])
    assert isinstance(stacked, batches.Batch) and stacked.tokens.shape == (2, 4, 2, 40)
    for of_both, *of_each in zip(stacked[:3], one[:3], two[:3], strict=True):
        np.testing.assert_array_equal(of_both, of_each)
        assert of_both.dtype == of_each[0].dtype
    assert stacked.positions is None


def test_batches_of_seeds_are_padded_to_the_longest_of_them():
    examples = random_examples(30)[0].drop_below(1)
    short, long = (batches.make_batch(examples, np.arange(4), n) for n in (40, 44))
    stacked = batches.stack_batches([short, long])
    for name in ("tokens", "positions"):
        of_both = getattr(stacked, name)
        assert of_both.shape == (2, 4, 44) and of_both.dtype == getattr(short, name).dtype
        np.testing.assert_array_equal(of_both[0], of_both[1])


def test_buckets_hold_their_examples():
    examples, _ = random_examples(100)
    seen = set()
    stream = batches.training_batches(examples, 4, 40, seed=0, buckets=(8, 24))
    for _ in range(100):
        batch = next(stream)
        length = batch.tokens.shape[1]
        seen.add(length)
        below = {8: 0, 24: 8, 40: 24}[length]
        assert below < batch.length.max() <= length
    assert seen == {8, 24, 40}
    with pytest.raises(UserError, match=r"model\.max_length=20"):
        next(batches.training_batches(examples, 100, 20, seed=0))


@pytest.mark.parametrize("buckets", [(), (8, 24)])
def test_evaluation_sees_every_example_once(buckets):
    examples, plain = random_examples(23)
    seen = []
    for rows, _, batch in batches.evaluation_batches(examples, 4, 40, buckets=buckets):
        assert batch.tokens.shape[0] == 4
        for place, row in enumerate(rows):
            text = plain[row][0][0]
            np.testing.assert_array_equal(batch.tokens[place, : len(text)], text)
            assert batch.length[place] == len(text)
        seen.extend(rows)
    assert sorted(seen) == list(range(23))
    assert buckets or seen == list(range(23))
