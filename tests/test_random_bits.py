"""Random bits of numbered elements, and dropout from these bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyformer_jax.attention import random_bits as module
from skyformer_jax.attention.random_bits import dropout, random_bits, threefry


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


def reference_bits(seed, counter):
    """Both words of Threefry-2x32 with 20 rounds, in Python's integers (Salmon et al., 2011)."""
    words = [*seed, seed[0] ^ seed[1] ^ 0x1BD11BDA]
    x, y = (counter + words[0]) % 2**32, words[1]
    for i in range(20):
        x = (x + y) % 2**32
        by = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        y = ((y << by | y >> (32 - by)) % 2**32) ^ x
        if i % 4 == 3:
            x = (x + words[(i // 4 + 1) % 3]) % 2**32
            y = (y + words[(i // 4 + 2) % 3] + i // 4 + 1) % 2**32
    return x, y


@pytest.mark.parametrize("width", [1, 5, 32, 333])
def test_all_platforms_have_the_same_bits(width):
    """The implementations for CPUs and for accelerators both give the bits of the definition."""
    rng, dropped = np.random.default_rng(0), 2**15
    seed, rows = (rng.integers(0, 2**32, shape, np.uint32) for shape in (2, (2, 3)))
    of_all, fused = (
        np.asarray(kept(width, dropped, jnp.asarray(seed), jnp.asarray(rows)))
        for kept in (module._kept_of_all, module._kept_fused)
    )
    np.testing.assert_array_equal(of_all, fused)
    count = -(-width // 4)
    for row in np.ndindex(rows.shape):
        first = int(rows[row]) * count
        words = np.array([reference_bits(seed.tolist(), (first + i) % 2**32) for i in range(count)])
        bits = np.stack([words.T % 2**16, words.T >> 16], axis=-1).ravel()[:width]
        np.testing.assert_array_equal(fused[row], bits >= dropped)
    np.testing.assert_array_equal(threefry(seed, rows), module._threefry_of_all(seed, rows))


def test_the_platform_of_the_program_chooses():
    """The platform that is lowered for decides, not that of this process, which has only CPUs."""

    def lowered(function, *arguments):
        program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        return program.as_text(), jax.jit(function).lower(*arguments).as_text()

    key, x = jax.random.key(0), jnp.ones((1, 64, 32))
    for function, argument in (
        (lambda key, x: dropout(key, x, 0.5), x),
        (random_bits, jnp.arange(64, dtype=jnp.uint32)),
    ):
        tpu, cpu = lowered(function, key, argument)
        # On the CPU, JAX's own Threefry computes all elements; on the TPU, only the key.
        assert tpu.count("@threefry2x32") < cpu.count("@threefry2x32")
