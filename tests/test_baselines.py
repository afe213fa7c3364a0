"""Each baseline against its paper's equations in float64, and in the limit where it is exact."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from test_attention import call, inputs, jitted, masks

from skyformer_jax import attention
from skyformer_jax.attention import bigbird, informer, landmarks, performer, reformer

LENGTH = 24
IDENTITY = np.eye(LENGTH, dtype=np.float32)

# Options under which each baseline is exact softmax attention; reformer's shares query and key.
EXACT = {
    "nystromformer": {"num_landmarks": LENGTH, "num_iterations": 24},
    "linformer": {"key_projection": IDENTITY, "value_projection": IDENTITY},
    "linformer per head": {"key_projection": np.stack([IDENTITY, IDENTITY[::-1]])},
    "informer": {"num_active_queries": LENGTH},
    "reformer": {"num_buckets": 1, "chunk_length": LENGTH},
    "reformer, wide chunk": {"chunk_length": 100},
    "bigbird, window": {"block_size": 5, "num_global_blocks": 0, "num_window_blocks": 9,
                        "num_random_blocks": 0},
    "bigbird, random": {"block_size": 5, "num_global_blocks": 0, "num_window_blocks": 1,
                        "num_random_blocks": 4},
    "bigbird, global": {"block_size": 5, "num_global_blocks": 9},
    "bigbird, one block": {},
    "bigbird, first and last": {"block_size": 5, "num_global_blocks": 5,
                                "global_blocks": "first_last"},
    "bigbird, all kinds": {"block_size": 4, "num_global_blocks": 1, "num_window_blocks": 3,
                           "num_random_blocks": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("masked", [False, True])
def test_limiting_case_is_softmax_attention(case, masked):
    """Checks values, and gradients by finite differences of the float64 reference."""
    name = case.split(",")[0].split(" ")[0]
    # Keys are near their queries: the pseudo-inverse of a nearly singular matrix tests nothing.
    q, k, v = inputs(LENGTH, LENGTH, head_dim=8)
    q, k = 3 * q, 3 * q + 0.3 * k
    mask = masks(3, LENGTH) if masked else None
    rng = np.random.default_rng(5)
    coefficients = rng.normal(size=q.shape)
    if masked:
        coefficients *= mask[:, :, None, None]
    options = {k: v for k, v in EXACT[case].items() if not isinstance(v, np.ndarray)}
    arrays = {k: v for k, v in EXACT[case].items() if isinstance(v, np.ndarray)}

    @jax.jit
    def loss(q, k, v):
        out = call(name, q, k, v, mask=mask, **options, **arrays)
        return (out * coefficients).sum(), out

    def reference(q, k, v):
        if name == "reformer":
            return references.shared_query_key_softmax(q, v, mask)
        return references.softmax(q, k, v, mask)

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    real = np.ones((3, LENGTH), bool) if mask is None else mask
    tolerance = 2e-3 if name == "nystromformer" else 1e-4
    np.testing.assert_allclose(
        np.asarray(out)[real], reference(q, k, v)[real], rtol=tolerance, atol=tolerance
    )
    references.assert_directional_derivatives(
        gradients,
        lambda *args: (reference(*args) * coefficients).sum(),
        (q, k, v),
        rng,
        tolerance=5e-3 if name == "nystromformer" else 1e-3,
    )


@pytest.mark.parametrize("num_landmarks", [1, 4, 9])
@pytest.mark.parametrize("lengths", [(30, 30), (17, 41)])
def test_nystromformer_equals_float64_reference(num_landmarks, lengths):
    q, k, v = inputs(*lengths)
    mask = masks(3, lengths[1])
    query_mask = mask if lengths[0] == lengths[1] else np.ones((3, lengths[0]), bool)
    out = jitted("nystromformer", num_landmarks=num_landmarks, num_iterations=24)(
        2 * q, 2 * k, v, mask=mask
    )
    expected = references.nystromformer(2 * q, 2 * k, v, num_landmarks, mask, query_mask)
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=2e-3)


def test_nystromformer_convolution_is_that_of_the_values():
    q, k, v = inputs(50, 50)
    mask = masks(3, 50)
    kernel = np.random.default_rng(0).normal(size=(33, 2)).astype(np.float32)
    function = jitted("nystromformer", num_landmarks=8)
    with_it = np.asarray(function(q, k, v, mask=mask, conv_kernel=kernel))
    without = np.asarray(function(q, k, v, mask=mask))
    values = np.where(mask[:, :, None, None], v, 0)
    for b in range(3):
        for h in range(2):
            for p in range(8):
                expected = np.convolve(values[b, :, h, p], kernel[::-1, h], mode="same")
                np.testing.assert_allclose(
                    (with_it - without)[b, :, h, p], expected, rtol=1e-4, atol=1e-4
                )
    with pytest.raises(ValueError, match="odd"):
        function(q, k, v, conv_kernel=kernel[1:])
    with pytest.raises(ValueError, match="q_length == kv_length"):
        function(q[:, 1:], k, v, conv_kernel=kernel)


@pytest.mark.parametrize("sharing", ["headwise", "key-value", "none"])
def test_linformer_equals_float64_reference(sharing):
    q, k, v = inputs(9, 21)
    mask = masks(3, 21)
    mask[-1, 0] = True
    rng = np.random.default_rng(0)
    shape = (2, 25, 6) if sharing == "none" else (25, 6)  # for up to 25 tokens
    e, f = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    arrays = {"key_projection": e} | ({} if sharing == "key-value" else {"value_projection": f})
    f = arrays.get("value_projection", e)
    per_head = [np.broadcast_to(x, (2, 25, 6))[:, :21] for x in (e, f)]
    out = jitted("linformer")(q, k, v, mask=mask, **arrays)
    np.testing.assert_allclose(
        out, references.linformer(q, k, v, *per_head, mask), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="25 tokens at most; got 30"):
        attention.linformer_attention(*inputs(9, 30), **arrays)
    with pytest.raises(ValueError, match="must have the same number of features"):
        attention.linformer_attention(q, k, v, key_projection=e, value_projection=f[..., :3])


def test_performer_equals_float64_reference():
    q, k, v = inputs(13, 30)
    mask = masks(3, 30)
    draw = jax.jit(performer.orthogonal_features, static_argnums=1)
    projection = draw(jax.random.key(3), (20, 8))
    out = jitted("performer")(q, k, v, mask=mask, projection=projection)
    np.testing.assert_allclose(
        out, references.performer(q, k, v, projection, mask), rtol=1e-4, atol=1e-4
    )


def test_performer_survives_large_inputs():
    """With exponents in the thousands, features without the max subtracted would be 0 or inf."""
    q, k, v = inputs(20, 20)
    out = jitted("performer")(100 * q, 100 * k, v)
    assert np.isfinite(out).all()
    # Every output row is a weighted average of the values.
    assert np.abs(out).max() <= np.abs(v).max() + 1e-4


def test_performer_features_are_orthogonal_normal_and_unbiased():
    draw = jax.jit(jax.vmap(lambda key: performer.orthogonal_features(key, (24, 8))))
    features = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)), np.float64)
    grams = features[:, :8] @ features[:, :8].swapaxes(1, 2)
    off_diagonal = grams * (1 - np.eye(8))
    assert np.abs(off_diagonal).max() < 1e-4
    flat = features.reshape(-1, 8)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(8), atol=0.03)
    # Squared lengths are chi-squared with 8 degrees of freedom: mean 8, variance 16.
    squares = (flat**2).sum(axis=1)
    np.testing.assert_allclose([squares.mean(), squares.var()], [8, 16], rtol=0.05)
    x, y = np.random.default_rng(0).normal(size=(2, 8)) * 0.5
    kernel = np.exp(flat @ (x + y) - (x @ x + y @ y) / 2)
    np.testing.assert_allclose(kernel.mean(), np.exp(x @ y), rtol=0.05)


def test_performer_error_falls_as_the_root_of_the_features():
    q, k, v = inputs(32, 32, batch=1)
    q, k = q / 4, k / 4  # close enough that the bias of the ratio is far below its spread
    exact = references.softmax(q, k, v)
    errors = []
    for num_features in (32, 128, 512):
        draw = jax.jit(jax.vmap(lambda key, m=num_features: attention.performer_attention(
            q, k, v, rng=key, num_features=m)))  # fmt: skip
        outs = draw(jax.random.split(jax.random.key(0), 40))
        errors.append(np.sqrt(((outs - exact) ** 2).mean()))
    # With 16 times as many features, the error falls to a quarter.
    assert errors[0] > errors[1] > errors[2]
    assert 3 < errors[0] / errors[2] < 5


@pytest.mark.parametrize("with_rng", [False, True])
def test_informer_equals_float64_reference(with_rng):
    q, k, v = inputs(40, 40)
    mask = masks(3, 40)
    mask[-1] = True
    rng = jax.random.key(1) if with_rng else None
    if with_rng:
        samples, valid = jax.jit(landmarks.uniform_landmarks, static_argnums=2)(rng, mask, 10)
    else:
        samples, valid = jax.jit(landmarks.strided_landmarks, static_argnums=1)(mask, 10)
    assert valid.all()
    out = jitted("informer", num_active_queries=7, num_sampled_keys=10)(q, k, v, mask=mask, rng=rng)
    expected = references.informer(q, k, v, np.asarray(samples), 7, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    # All rows but the seven active queries are the mean of the unmasked values.
    mean = np.where(mask[:, :, None, None], v, 0).sum(1, keepdims=True)
    mean = mean / mask.sum(1)[:, None, None, None]
    different = np.abs(np.asarray(out) - mean).max(axis=-1) > 1e-4
    assert (different.sum(axis=1) == 7).all()


def test_informer_moves_rows_alike_on_all_platforms():
    """Gathers and scatters agree with the matrix products used on TPUs, gradients included."""
    q, rows, default = inputs(21, 5)[0], inputs(5, 5)[0], inputs(21, 21)[1]
    order = np.random.default_rng(0).permutation(21)[:15].astype(np.int32)
    indices = np.stack([order.reshape(3, 5), 20 - order.reshape(3, 5)], axis=1)  # 2 heads

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def moved(gather, scatter):
        def both(q, default, rows):
            return gather(q, indices), scatter(default, indices, rows)

        out, pull = jax.vjp(both, q, default, rows)
        return out, pull(jax.tree.map(jnp.sin, out))

    expected = moved(informer._gather, informer._scatter)
    found = moved(informer._gather_by_product, informer._scatter_by_product)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    (gathered, scattered), _ = jax.device_get(expected)
    for head in range(2):
        np.testing.assert_array_equal(gathered[0, :, head], q[0, indices[0, head], head])
        at = scattered[0, indices[0, head], head]
        np.testing.assert_array_equal(at, rows[0, :, head])


@pytest.mark.parametrize(
    ("length", "num_buckets", "chunk_length", "factors"),
    [
        (40, 4, 8, (4,)),
        (41, 2, 8, (2,)),
        (60, 8, 7, (8,)),
        (30, 1, 7, (1,)),
        (23, 16, 40, (16,)),
        (150, 256, 3, (16, 16)),
    ],
)
def test_reformer_equals_float64_reference(length, num_buckets, chunk_length, factors):
    """Covers several hash rounds, chunk borders, lone tokens, odd lengths and combined hashes."""
    q, _, v = inputs(length, length)
    mask = masks(3, length)
    shape = (3, 8, max(1, sum(factors) // 2))
    rotations = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    out = jitted("reformer", num_buckets=num_buckets, chunk_length=chunk_length)(
        q, None, v, mask=mask, rotations=rotations
    )
    expected = references.reformer(
        q, v, rotations, mask, factors=factors, chunk_length=chunk_length
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_reformers_factors():
    """One hash up to 128 buckets; beyond that, the fewest, about equal, even factors up to 128."""
    known = {1: (1,), 128: (128,), 256: (16, 16), 512: (16, 32), 8192: (64, 128), 2**15: (32,) * 3}
    assert {number: reformer.hash_factors(number) for number in known} == known
    for num_buckets in (*range(130, 3000, 2), 16_384, 16_386, 2 * 78_125, 2**21 - 2, 2**21 + 2):
        factors = reformer.hash_factors(num_buckets)
        assert all(factor % 2 == 0 and factor <= 128 for factor in factors)
        assert num_buckets <= math.prod(factors) <= 1.4 * num_buckets
        assert 128 ** (len(factors) - 1) < num_buckets
        assert reformer.num_columns(factors) <= 64 * math.log(num_buckets, 128) + 64


hash_buckets = jax.jit(reformer.hash_buckets, static_argnums=2)


def test_reformers_combined_hash_equals_float64_reference():
    """Three hashes, each a digit of the bucket's number."""
    factors = (4, 2, 6)
    rows = inputs(50, 50)[0]
    rotations = jax.random.normal(jax.random.key(0), (2, 8, 9))
    buckets = np.asarray(hash_buckets(rows, rotations, factors))
    for r, rotation in enumerate(np.asarray(rotations, np.float64)):
        projected = np.einsum("bnhp,pc->bhnc", np.asarray(rows, np.float64), rotation)
        number = buckets[:, :, r]
        for first, factor in zip((0, 2, 3), factors, strict=True):
            part = projected[..., first : first + factor // 2]
            expected = np.concatenate([part, -part], axis=-1).argmax(axis=-1)
            np.testing.assert_array_equal(number % factor, expected)
            number = number // factor
        assert not number.any()


def test_reformer_takes_one_hash_where_it_is_told_to_or_has_few_buckets():
    """factorize_hash=False also serves runs that started before hashes were factorized."""
    q, _, v = inputs(150, 150)
    rotations = jax.random.normal(jax.random.key(0), (2, 8, 128))

    def out(num_buckets, **options):
        return jitted("reformer", num_buckets=num_buckets, chunk_length=5, **options)(
            q, None, v, rotations=rotations
        )

    expected = references.reformer(q, v, rotations, factors=(256,), chunk_length=5)
    np.testing.assert_allclose(out(256, factorize_hash=False), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(out(256) - expected).max() > 0.01
    np.testing.assert_array_equal(out(128), out(128, factorize_hash=False))


def test_reformer_costs_n_log_n():
    """Compares the flops and memory of the compiled gradients at 16k and 256k tokens."""

    def loss(q, v):
        return jnp.sin(attention.reformer_attention(q, None, v)).sum()

    def work(length):
        rows = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(rows, rows).compile()
        memory = program.memory_analysis().temp_size_in_bytes
        return np.array([program.cost_analysis()["flops"], memory])

    short, long = 2**14, 2**18
    growth = long * math.log(long) / (short * math.log(short))
    assert (work(long) <= 1.02 * growth * work(short)).all()


def test_reformers_scores_are_divided_by_the_norm_of_the_key_alone():
    """The default scale is 1, as published; None means 1/sqrt(head_dim), as elsewhere."""
    q, _, v = inputs(6, 6)
    for options, scale in (({}, 1.0), ({"scale": None}, 8**-0.5), ({"scale": 0.3}, 0.3)):
        scores = scale * np.einsum("bqhp,bkhp->bhqk", q, q / np.linalg.norm(q, axis=-1)[..., None])
        weights = np.exp(np.where(np.eye(6, dtype=bool), -np.inf, scores))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("bhqk,bkhp->bqhp", weights, v)
        out = jitted("reformer", **options)(q, None, v)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_reformer_attends_to_itself_only_when_alone():
    q, _, v = inputs(6, 6, batch=1)
    mask = np.arange(6)[None] % 5 == 0
    pair = np.asarray(jitted("reformer")(q, None, v, mask=mask))
    np.testing.assert_allclose(pair[0, 0], v[0, 5], rtol=1e-5)
    alone = np.asarray(jitted("reformer")(q, None, v, mask=np.arange(6)[None] == 0))
    np.testing.assert_allclose(alone[0, 0], v[0, 0], rtol=1e-5)


def test_reformer_hashes_near_tokens_alike():
    """The chance of sharing a bucket falls as the angle grows (Andoni et al., 2015)."""
    rotations = jax.random.normal(jax.random.key(0), (2000, 8, 4))
    angles = np.array([0.0, 0.3, 0.8, 1.57, 3.14])
    rows = np.zeros((len(angles), 8), np.float32)
    rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
    buckets = np.asarray(hash_buckets(rows[None, :, None], rotations, (8,)))[0, 0]
    same = (buckets == buckets[:, :1]).mean(axis=0)
    assert same[0] == 1
    assert (np.diff(same) < -0.05).all()
    assert same[-1] == 0


def test_reformer_takes_one_array_as_query_and_key():
    q, k, v = inputs(12, 12)
    one, two = (
        jax.jit(lambda q, v, key=key: attention.reformer_attention(q, key(q), v))(q, v)
        for key in (lambda q: None, lambda q: q)
    )
    np.testing.assert_array_equal(two, one)
    with pytest.raises(ValueError, match="key=None"):
        attention.reformer_attention(q, k, v)


attended_blocks = jax.jit(bigbird.attended_blocks, static_argnums=(1, 2, 3, 4, 5))


def bigbird_allowed(length, block_size, num_global, num_window, num_random, rng, mask, last):
    """Returns whether each query may attend to each key, bool [batch, length, length].

    `last` of the global blocks are at the end of the sequence, the others at the start.
    """
    num_blocks = -(-length // block_size)
    first = num_global - last
    sizes = (num_blocks, first, num_window, num_random, last)
    blocks, valid = map(np.asarray, attended_blocks(rng, *sizes))
    allowed = np.zeros((num_blocks, num_blocks), int)
    for row in range(num_blocks):
        np.add.at(allowed[row], blocks[row][valid[row]], 1)
    assert allowed.max() == 1  # no block twice
    everywhere = {*range(first), *range(num_blocks - last, num_blocks)}
    assert all(allowed[:, block].all() for block in everywhere)
    allowed[sorted(everywhere)] = 1
    full = np.repeat(np.repeat(allowed, block_size, 0), block_size, 1)[:length, :length]
    return full.astype(bool)[None] & mask[:, None, :]


@pytest.mark.parametrize("length", [64, 33, pytest.param(61, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kinds", [(2, 3, 3), (0, 1, 1), (3, 5, 0), (1, 3, 50)])
@pytest.mark.parametrize("where", ["first", "first_last"])
def test_bigbird_equals_masked_dense_attention(length, kinds, where):
    q, k, v = inputs(length, length)
    mask = masks(3, length)
    rng = jax.random.key(2)
    names = ("num_global_blocks", "num_window_blocks", "num_random_blocks")
    options = dict(zip(names, kinds, strict=True))
    function = jitted("bigbird", block_size=4, global_blocks=where, **options)
    out = function(q, k, v, mask=mask, rng=rng)
    last = kinds[0] // 2 if where == "first_last" else 0
    allowed = bigbird_allowed(length, 4, *kinds, rng, mask, last)
    expected = references.masked_softmax(q, k, v, allowed)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_bigbird_random_blocks_are_uniform_and_distinct():
    draw = functools.partial(
        bigbird.attended_blocks, num_blocks=12, num_first=1, num_window=3, num_random=3
    )
    blocks, valid = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    blocks = np.asarray(blocks)[:, :, 4:]
    assert np.asarray(valid)[..., 4:].all()
    for row in range(12):
        window = {row - 1, row, row + 1} | {0}
        counts = np.bincount(blocks[:, row].ravel(), minlength=12)
        allowed = sorted(set(range(12)) - window)
        assert counts.sum() == counts[allowed].sum() == 12000
        expected = 12000 / len(allowed)
        assert np.abs(counts[allowed] - expected).max() < 5 * expected**0.5
        assert all(len(set(x)) == 3 for x in blocks[:50, row])


def test_bigbird_of_global_blocks_alone():
    """The first and last block are global, as published.

    Every query attends to their keys, and their queries attend to every key. Each block also
    attends to itself.
    """
    q, k, v = inputs(23, 23)
    out = jitted(
        "bigbird",
        block_size=4,
        num_window_blocks=1,
        num_random_blocks=0,
        global_blocks="first_last",
    )(q, k, v)
    block = np.arange(23) // 4
    ends = np.isin(block, (0, 5))
    allowed = ends[:, None] | ends[None, :] | (block[:, None] == block[None, :])
    expected = references.masked_softmax(q, k, v, np.broadcast_to(allowed, (3, 23, 23)))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="global_blocks must be one of first, first_last; got 'l"):
        attention.bigbird_attention(q, k, v, global_blocks="last")


def test_bigbird_pattern_fixes_the_blocks():
    q, k, v = inputs(64, 64)
    function = jitted("bigbird", block_size=4)
    one, two = (function(q, k, v, pattern=np.array([0, i], np.uint32)) for i in (1, 2))
    assert np.abs(one - two).max() > 1e-3
    by_key = function(q, k, v, rng=jax.random.wrap_key_data(np.array([0, 1], np.uint32)))
    np.testing.assert_array_equal(one, by_key)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nystromformer", {"num_landmarks": 0}, "num_landmarks must be at least 1"),
        ("linformer", {"num_features": 0}, "num_features must be at least 1"),
        ("performer", {"num_features": -1}, "num_features must be at least 1"),
        ("performer", {"projection": np.ones((4, 3), np.float32)}, "head_dim = 8"),
        ("informer", {"num_active_queries": 0}, "num_active_queries must be at least 1"),
        ("reformer", {"num_buckets": 3}, "even"),
        ("reformer", {"rotations": np.ones((2, 8, 1), np.float32), "num_buckets": 4}, "2 columns"),
        ("reformer", {"chunk_length": 0}, "chunk_length must be at least 1"),
        ("bigbird", {"num_window_blocks": 2}, "odd"),
        ("bigbird", {"num_random_blocks": -1}, "at least 0"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, *inputs(9, 9), **options)
