"""Attentions on a sharded sequence give the values and gradients of a single device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from skyformer_jax.attention import ATTENTIONS, SPLITTABLE, kernelized_attention, shards

LENGTH, HEADS, HEAD_DIM = 32, 2, 4
RNG = np.random.default_rng(0)
CASES = {
    "kernelized, dense": ("kernelized", {"implementation": "dense"}),
    "kernelized, chunked": ("kernelized", {"implementation": "chunked"}),
    "skyformer, spread": ("skyformer", {"num_landmarks": 7}),
    "skyformer, drawn": ("skyformer", {"num_landmarks": 7, "rng": jax.random.key(1)}),
    "skyformer, more landmarks than rows of a device": (
        "skyformer",
        {"num_landmarks": 20, "rng": jax.random.key(2), "inverse": "cholesky"},
    ),
    "skyformer, means": ("skyformer", {"num_landmarks": 7, "landmarks": "segment_means"}),
    "skyformer, given": (
        "skyformer",
        {"landmark_indices": jnp.asarray(RNG.integers(0, 2 * LENGTH, (4, 9)))},
    ),
    "skyformer, learned, with a convolution": (
        "skyformer",
        {
            "landmarks": jnp.asarray(RNG.normal(size=(5, HEADS, HEAD_DIM)), jnp.float32),
            "normalize": True,
            "conv_kernel": jnp.asarray(RNG.normal(size=(3, HEADS, HEAD_DIM)), jnp.float32),
        },
    ),
    "skyformer, causal": (
        "skyformer",
        {
            "landmarks": jnp.asarray(RNG.normal(size=(5, HEADS, HEAD_DIM)), jnp.float32),
            "normalize": True,
            "conv_kernel": jnp.asarray(RNG.normal(size=(3, HEADS, HEAD_DIM)), jnp.float32),
            "is_causal": True,
        },
    ),
    "performer, causal": ("performer", {"num_features": 16, "is_causal": True}),
    "nystromformer": ("nystromformer", {"num_landmarks": 7}),
    "nystromformer, convolution": (
        "nystromformer",
        {
            "num_landmarks": 7,
            "conv_kernel": jnp.asarray(RNG.normal(size=(9, HEADS)), jnp.float32),
        },
    ),
    "linformer": ("linformer", {"num_features": 6}),
    "linformer, a longer table": (
        "linformer",
        {"key_projection": jnp.asarray(RNG.normal(size=(HEADS, LENGTH + 5, 6)), jnp.float32)},
    ),
    "performer": ("performer", {"num_features": 16}),
}


def inputs():
    query, key, value, weights = (
        jnp.asarray(RNG.normal(size=(4, LENGTH, HEADS, HEAD_DIM)), jnp.float32) for _ in range(4)
    )
    # Whole shards of padding, also in the middle; holes; and an example that is all padding.
    mask = np.ones((4, LENGTH), bool)
    mask[0, 3:] = False
    mask[1, 8:24] = False
    mask[2, ::3] = False
    mask[3] = False
    value = jnp.where(mask[:, :, None, None], value, jnp.nan)
    return query, key, value, jnp.asarray(mask), weights


def value_and_gradients(attention, options):
    """Returns a function of the inputs, or their shards, that gives output and three gradients."""

    def function(query, key, value, mask, weights):
        def loss(query, key, value):
            out = attention(query, key, value, mask=mask, **options)
            return (out * weights * mask[:, :, None, None]).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        return out, gradients

    return function


def split(function, parts):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:parts]), ("seq",))
    along = P(None, "seq")
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    )


def test_the_cases_are_all():
    assert {name for name, _ in CASES.values()} == set(SPLITTABLE)


@pytest.mark.parametrize("case", CASES)
def test_parts_change_nothing(case):
    name, options = CASES[case]
    arrays = inputs()
    out, gradients = jax.jit(value_and_gradients(ATTENTIONS[name], options))(*arrays)
    function = value_and_gradients(ATTENTIONS[name], {**options, "axis_name": "seq"})
    other_out, other_gradients = split(function, 4)(*arrays)
    real = np.asarray(arrays[3])
    np.testing.assert_allclose(other_out[real], out[real], rtol=2e-4, atol=1e-5)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        scale = np.abs(gradient).max()
        assert scale > 0
        np.testing.assert_allclose(other, gradient, rtol=1e-3, atol=1e-4 * scale)


def test_a_scale_is_learned_across_parts():
    """Compares the ring's custom gradient rule with the gradient on one device."""
    query, key, value, mask, weights = inputs()

    def loss(scale, query, key, value, mask, weights, **options):
        out = kernelized_attention(query, key, value, mask=mask, scale=scale, **options)
        return (out * weights * mask[:, :, None, None]).sum()

    expected = jax.grad(loss)(0.3, query, key, value, mask, weights)

    def here(*arrays):
        return jax.grad(loss)(0.3, *arrays, axis_name="seq")[None, None]

    parts = split(here, 4)(query, key, value, mask, weights)
    np.testing.assert_allclose(parts.sum(), expected, rtol=1e-4)


def test_running_counts_go_across_shards_and_sequences():
    masks = [RNG.random((3, LENGTH)) < 0.5, RNG.random((3, 2 * LENGTH)) < 0.2]

    def here(*masks):
        counted, counts = shards.running_counts(masks, "seq")
        return jnp.split(counted, [LENGTH // 4], axis=1), counts[:, None]

    (first, second), counts = split(here, 4)(*masks)
    expected = np.cumsum(np.concatenate(masks, axis=1), axis=1)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), expected)
    np.testing.assert_array_equal(counts, np.repeat(expected[:, -1:], 4, axis=1))


def test_what_cannot_be_split_is_said():
    query, key, value, *_ = inputs()

    def attend(name, **options):
        def here(*arrays):
            return ATTENTIONS[name](*arrays, axis_name="seq", **options)

        return split(here, 8)(query, key, value)

    with pytest.raises(ValueError, match="uniform, strided or segment_means"):
        attend("skyformer", landmarks="kmeans++")
    with pytest.raises(ValueError, match="parts of 4 positions are too short: 5"):
        attend("nystromformer", conv_kernel=jnp.ones((11, HEADS)))
