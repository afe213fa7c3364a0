"""Splits that choose examples by content, independently of their order."""

import itertools

import numpy as np
import pytest

from skyformer_jax.data import splits
from skyformer_jax.errors import UserError


def examples(seed, count, num_classes):
    rng = np.random.default_rng(seed)
    contents = [rng.bytes(rng.integers(1, 40)) + str(i).encode() for i in range(count)]
    return rng, contents, rng.permutation(np.arange(count) % num_classes)


@pytest.mark.parametrize(
    ("num_classes", "count"), [(2, 0), (2, 1), (2, 40), (10, 37), (3, 300), (1, 5)]
)
def test_exact_balanced_and_whatever_the_order(num_classes, count):
    rng, contents, labels = examples(count, 300, num_classes)
    chosen = splits.hold_out(contents, labels, count, seed=7)
    assert chosen.dtype == bool
    assert chosen.sum() == count
    shares = np.bincount(labels[chosen], minlength=num_classes)
    assert np.ptp(shares) <= 1
    assert (np.diff(shares) <= 0).all()
    order = rng.permutation(300)
    shuffled = splits.hold_out([contents[i] for i in order], labels[order], count, seed=7)
    np.testing.assert_array_equal(shuffled, chosen[order])


def test_fewer_are_part_of_more_and_another_seed_is_another_choice():
    _, contents, labels = examples(1, 400, 4)
    choices = [splits.hold_out(contents, labels, count, seed=0) for count in (5, 50, 51, 200, 400)]
    for fewer, more in itertools.pairwise(choices):
        assert (fewer <= more).all()
    other = splits.hold_out(contents, labels, 200, seed=1)
    assert 60 < (other & choices[3]).sum() < 140  # 100 by chance, with a deviation of 5


def test_chosen_by_content_and_seed_alone():
    contents, labels = [b"a", b"b", b"c", b"d", b"e", b"f"], np.array([0, 1, 0, 1, 0, 1])
    chosen = splits.hold_out(contents, labels, 2, seed=3)
    arrays = [np.frombuffer(content, np.uint8) for content in contents]
    np.testing.assert_array_equal(splits.hold_out(arrays, labels, 2, seed=3), chosen)
    # In every class the smallest hash is chosen, whichever other examples there are.
    few = np.flatnonzero(chosen)
    assert splits.hold_out([contents[i] for i in few], labels[few], 2, seed=3).all()
    again = splits.hold_out(contents, 5 - 3 * labels, 2, seed=3)  # renamed labels
    np.testing.assert_array_equal(again, chosen)


def test_duplicates_stay_together_but_at_the_edge():
    rng, contents, labels = examples(2, 200, 2)
    twice = rng.permutation(400)
    contents, labels = [contents[i // 2] for i in twice], labels[twice // 2]
    for count in (100, 102, 250):
        chosen = splits.hold_out(contents, labels, count, seed=0)
        sides = [set(), set()]
        for content, side in zip(contents, chosen, strict=True):
            sides[int(side)].add(content)
        assert len(sides[0] & sides[1]) == {100: 0, 102: 2, 250: 2}[count]


def test_too_few_of_a_class_is_said():
    _, contents, labels = examples(3, 20, 2)
    with pytest.raises(UserError, match=r"hold out 21 of 20 .* class 0 has 10 of the 11 needed"):
        splits.hold_out(contents, labels, 21, seed=0)


def test_names_are_split_80_10_10_each_for_itself():
    names = [f"imgs/{i // 1000}/sample_{i % 1000}.png" for i in range(20_000)]
    chosen = [splits.split_by_name(name) for name in names]
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        deviation = (20_000 * share * (1 - share)) ** 0.5
        assert abs(chosen.count(split) - 20_000 * share) < 4 * deviation
    other = [splits.split_by_name(name, seed=1) for name in names]
    agreement = np.mean(np.array(chosen) == np.array(other))
    assert abs(agreement - 0.66) < 0.02
