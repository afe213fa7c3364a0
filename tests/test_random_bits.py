"""Random bits of numbered elements, and the dropout made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyformer_jax.attention.random_bits import dropout, random_bits


def test_random_bits_are_those_of_a_counter():
    counters = jnp.arange(1000, dtype=jnp.uint32).reshape(10, 100)
    words = random_bits(jax.random.key(0), counters)
    np.testing.assert_array_equal(words[:, 3:5], random_bits(jax.random.key(0), counters[3:5]))
    assert len(np.unique(words)) > 1995
    bits = np.unpackbits(np.asarray(words).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)
    assert np.any(words != random_bits(jax.random.key(1), counters))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    x = jnp.ones((1, 400, 333))  # an odd size
    (out,) = np.asarray(dropout(jax.random.key(0), x, rate))
    dropped = (out == 0).mean()
    assert abs(dropped - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-4)
    # Neighbours, in a row and across rows, are dropped independently of each other.
    for a, b in ((out[:, 1:], out[:, :-1]), (out[1:], out[:-1]), (out[:, 2:], out[:, :-2])):
        both = ((a == 0) & (b == 0)).mean()
        assert abs(both - rate**2) < 5 * np.sqrt(rate**2 / a.size)


def test_dropout_depends_on_its_key_alone():
    x = jax.random.normal(jax.random.key(1), (3, 2, 7, 5))
    keys = jax.random.split(jax.random.key(2), 3)
    mapped = jax.vmap(lambda key, x: dropout(key, x, 0.5))(keys, x)
    for i in range(3):
        np.testing.assert_array_equal(mapped[i], dropout(keys[i], x[i], 0.5))
    assert not np.array_equal(mapped[0] == 0, mapped[1] == 0)
    np.testing.assert_array_equal(dropout(keys[0], x[0], 0.0), x[0])
