"""Hashed n-grams: exact, spread evenly, causal, and alike on split sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_model import tiny_config

from skyformer_jax import models
from skyformer_jax.ngrams import hashed_ngrams

RNG = np.random.default_rng(0)


def row_of(ngram, num_rows):
    hashed = 0
    for token in ngram:
        hashed = (hashed ^ token) * 0x9E3779B1 % 2**32
        hashed ^= hashed >> 15
    return hashed % num_rows


@pytest.mark.parametrize(("n", "num_rows"), [(2, 8192), (3, 100), (7, 1)])
def test_rows_are_those_of_exact_integers(n, num_rows):
    tokens = RNG.integers(0, 257, (2, 11))
    padded = np.pad(tokens, ((0, 0), (n - 1, 0)))
    expected = [[row_of(x[i : i + n].tolist(), num_rows) for i in range(11)] for x in padded]
    for dtype in (jnp.int32, jnp.uint16):
        rows = hashed_ngrams(jnp.asarray(tokens, dtype), n, num_rows)
        assert rows.dtype == jnp.int32
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("num_rows", [1024, 1000])
def test_ngrams_spread_evenly(num_rows):
    """Compares the numbers of trigrams in the rows with a uniform choice (chi-squared, 7 sigma)."""
    trigrams = jnp.asarray(np.stack(np.meshgrid(*3 * [np.arange(97, 123)])).reshape(3, -1).T)
    counts = np.bincount(hashed_ngrams(trigrams, 3, num_rows)[:, -1], minlength=num_rows)
    mean = len(trigrams) / num_rows
    excess = ((counts - mean) ** 2 / mean).sum() - num_rows
    assert excess < 7 * (2 * num_rows) ** 0.5


def test_a_token_reaches_the_ngrams_that_contain_it():
    tokens = RNG.integers(0, 257, (1, 20))
    changed = tokens.copy()
    changed[0, 8] += 1
    one, two = (hashed_ngrams(jnp.asarray(x), 5, 2**20) for x in (tokens, changed))
    np.testing.assert_array_equal(np.flatnonzero((one != two)[0]), np.arange(8, 13))


def test_a_split_sequence_has_the_same_rows():
    tokens = jnp.asarray(RNG.integers(0, 257, (2, 32)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("seq",))

    def split(n):
        def rows(part):
            return hashed_ngrams(part, n, 8192, axis_name="seq")

        return jax.shard_map(rows, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))

    np.testing.assert_array_equal(jax.jit(split(9))(tokens), hashed_ngrams(tokens, 9, 8192))
    with pytest.raises(ValueError, match="9 are needed"):
        split(10)(tokens)


def test_a_model_reads_the_order_of_tokens_by_its_ngrams():
    """Without positions, blocks do not see an order; the tables of n-grams do."""
    tokens = jnp.asarray(RNG.integers(1, 15, (2, 48)))
    mask = tokens > 0
    order = RNG.permutation(48)
    for ngrams in ([], [2, 3]):
        model = models.build_model(
            tiny_config("softmax", num_layers=1, ngrams=ngrams, ngram_rows=64, positions="rotary")
        )
        variables = model.init(jax.random.key(0), tokens, mask)
        params = variables["params"]
        tables = {name: x.shape for name, x in params.items() if name.startswith("ngram")}
        assert tables == {f"ngram_embedding_{n}": (64, model.width) for n in ngrams}
        hash(model)
        # Constant queries see all positions alike, whatever their rotation.
        layer = params["block_0"]["attention_layer"]
        for part in ("query", "key"):
            layer[part] = jax.tree.map(jnp.zeros_like, layer[part])
        plain, shuffled = (model.apply(variables, x, mask) for x in (tokens, tokens[:, order]))
        difference = float(jnp.abs(plain - shuffled).max())
        assert difference > 1e-4 if ngrams else difference < 1e-6


def test_masked_tokens_are_in_no_ngram():
    model = models.build_model(tiny_config("softmax", num_layers=1, ngrams=(3,)))
    tokens = jnp.asarray(RNG.integers(1, 15, (2, 48)))
    mask = jnp.asarray(RNG.random((2, 48)) < 0.7)
    variables = model.init(jax.random.key(0), tokens, mask)
    junk = jnp.where(mask, tokens, RNG.integers(1, 15, (2, 48)))
    one, two = (model.apply(variables, x, mask) for x in (tokens, junk))
    np.testing.assert_array_equal(one, two)
