"""Compiles programs ahead of time for absent TPUs and prints their costs as JSON.

test_compiled.py runs this file in a separate process, because it loads libtpu and because the
tests' XLA flags are for CPUs.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import text
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.compiled import compile_step, described_devices
from experiments.benchmarks.hlo import parse
from experiments.benchmarks.program_costs import PEAKS, costs
from skyformer_jax import attention


def gradients(name: str, mesh: jax.sharding.Mesh) -> dict:
    """Returns the costs of an attention's gradients for 2 x 1024 tokens on one device."""
    function, shared = attention.ATTENTIONS[name], attention.REGISTRY[name].shared_query_key

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sin(function(query, None if shared else key, value)).sum()

    sharding = NamedSharding(mesh, P())
    rows = jax.ShapeDtypeStruct((2, 1024, 2, 32), jnp.float32, sharding=sharding)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(rows, rows, rows).compile()
    return costs(parse(program.as_text()), PEAKS["TPU v5 lite"])


def step(devices: list, length: int) -> dict:
    """Returns compile_step's row for a one-layer Skyformer, sequences sharded over 4 devices."""
    config = text.get_config("skyformer")
    config.model.max_length = length
    config.model.positions = "sinusoidal"
    config.model.num_layers = 1
    config.train.batch_size = 4
    return compile_step(config, devices, 2, 4)[0]


def causal(devices: list, length: int) -> dict:
    """Returns the collectives of causal Skyformer's gradients, sequence sharded over 8 devices."""
    mesh = jax.sharding.Mesh(devices, ("seq",))
    landmarks = jnp.arange(2048, dtype=jnp.float32).reshape(32, 2, 32) / 2048

    def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        def loss(*arrays: jax.Array) -> jax.Array:
            options = {"landmarks": landmarks, "is_causal": True, "axis_name": "seq"}
            return jnp.sin(attention.skyformer_attention(*arrays, **options)).sum()

        return jax.grad(loss, (0, 1, 2))(*arrays)

    along = P(None, "seq")
    split = jax.shard_map(gradients, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    sharding = NamedSharding(mesh, along)
    rows = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32, sharding=sharding)
    return collectives(jax.jit(split).lower(rows, rows, rows).compile().as_text())


devices = described_devices("tpu", "v5e:2x4")
one = jax.sharding.Mesh(devices[:1], ("data",))
print(
    json.dumps(
        {
            "attentions": {name: gradients(name, one) for name in attention.NAMES},
            "causal": [causal(devices, length) for length in (4096, 16384)],
            "steps": list(map(functools.partial(step, devices), (4096, 8192))),
        }
    )
)
