"""What dividing a step over devices costs: throughput, bytes between devices, and the wire.

    python -m experiments.benchmarks.scaling

Throughput: the quickstart's step with its batch divided over 1, 2, 4, 8 devices, by shard_map and
by pmap, and a step of the Text model (length 4,096, batch 4) with its sequences divided; they take
turns in one process. Fake devices share the cores, so this shows what dividing costs, not what it
gains. Bytes: what a device sends in a step of the Text model with sequences in 8 parts, for every
attention that can be divided, at several lengths, as the compiled programs say. Wire: seconds of
an all-reduce and of a ring's pass between two processes on 127.0.0.1. Writes JSON with commit,
versions and hardware.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# With fewer threads than devices, collectives of fake devices can wait for each other for ever.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import quickstart, text
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.timing import compile_all, take_turns
from experiments.provenance import provenance, write_json
from skyformer_jax import attention, cli
from skyformer_jax.data.batches import Batch
from skyformer_jax.models import build_model
from skyformer_jax.progress import track
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training import steps

_FAKE_DEVICES = flags.DEFINE_integer("fake_devices", 8, "Of a CPU; 0: the real ones.")
_LENGTHS = flags.DEFINE_list("lengths", "1024,4096,16384", "Of the bytes that cross devices.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each step takes.", lower_bound=1)
_WIRE = flags.DEFINE_string("wire", "", "Used by the script itself: this is one of two processes.")
_OUT = flags.DEFINE_string("out", "results/scaling.json", "File to write.")
_WIRE_BYTES = tuple(4**i for i in range(5, 13))  # 1 KiB to 16 MiB


def make_step(
    config: ml_collections.ConfigDict, data: int, seq: int, backend: str
) -> tuple[Any, Any, Any]:
    """The training step on a mesh of so many devices, a function that makes states, and a batch."""
    mesh = meshes.make_mesh(data, seq, jax.devices()[: data * seq])
    model = build_model(config, axis_name=meshes.sequence_axis(mesh))
    optimizer, shape = steps.make_optimizer(config), steps.token_shape(config)
    init = jax.jit(
        lambda: steps.init_states([0], model, optimizer, shape),
        out_shardings=meshes.replicated(mesh),
    )
    step = steps.make_train_step(
        model, optimizer, mesh, 10, steps.reading_of(config), 1, backend=backend
    )
    rng, size = np.random.default_rng(0), (1, 1, config.train.batch_size)
    batch = Batch(
        rng.integers(1, min(config.model.vocab_size, 256), (*size, *shape), np.uint8),
        np.full((*size, *shape[:-1]), shape[-1], np.int32),
        np.zeros(size, np.int32),
    )
    return step, init, meshes.shard_batch(batch, mesh, axis=2)


def throughput() -> list[dict[str, Any]]:
    """Rows of data, seq, backend and seconds of a step, for two models."""
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    small, long = quickstart.get_config(), text.get_config()
    long.train.batch_size = 4
    ways = {
        **{("quickstart", n, 1, "shard_map"): small for n in counts},
        **{("quickstart", n, 1, "pmap"): small for n in counts},
        **{("text", 1, n, "shard_map"): long for n in counts},
    }
    made = {way: make_step(config, *way[1:]) for way, config in ways.items()}
    programs, compiled = compile_all(
        {way: lambda made=made[way]: made[0].lower(made[1](), made[2]) for way in ways}, "steps"
    )

    def training(way: tuple[Any, ...]) -> Any:
        _, init, batch = made[way]
        states = init()

        def call() -> Any:
            nonlocal states
            states, sums = programs[way](states, batch)
            return sums

        return call

    turns = take_turns({way: training(way) for way in programs}, _ROUNDS.value, "steps")
    return [
        {
            **dict(zip(("config", "data", "seq", "backend"), way, strict=True)),
            **compiled[way],
            **turns.get(way, {}),
        }
        for way in ways
    ]


def crossing(lengths: list[int]) -> list[dict[str, Any]]:
    """Rows of attention, length and the bytes that cross devices in a step, by kind."""
    rows, parts = [], jax.device_count()
    cells = [(name, length) for name in attention.SPLITTABLE for length in lengths]
    for name, length in track(cells, len(cells), "bytes between devices", "programs"):
        config = text.get_config(name)
        config.model.update({"max_length": length, "positions": "sinusoidal"})
        config.train.batch_size = 1
        step, init, batch = make_step(config, 1, parts, "shard_map")
        program = step.lower(jax.eval_shape(init), batch).compile()
        rows.append(
            {
                "attention": name,
                "length": length,
                "parts": parts,
                "collectives": collectives(program.as_text()),
            }
        )
    return rows


def _one_of_two(where: str) -> None:
    """Times both collectives between two processes, and prints bytes and seconds."""
    address, _, index = where.rpartition("/")
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("wire",))
    kinds = {
        "all-reduce": lambda x: jax.lax.psum(x, "wire"),
        "collective-permute": lambda x: jax.lax.ppermute(x, "wire", [(0, 1), (1, 0)]),
    }
    for kind, function in kinds.items():
        call = jax.jit(
            jax.shard_map(
                function, mesh=mesh, in_specs=P("wire"), out_specs=P("wire"), check_vma=False
            )
        )
        for size in _WIRE_BYTES:
            make = jax.jit(
                lambda size=size: jnp.zeros(2 * size // 4),
                out_shardings=NamedSharding(mesh, P("wire")),
            )
            x, seconds = make(), []
            for _ in range(21):
                start = time.perf_counter()
                jax.block_until_ready(call(x))
                seconds.append(time.perf_counter() - start)
            print(f"row {kind} {size} {statistics.median(seconds[1:])}")


def wire() -> list[dict[str, Any]]:
    """Rows of kind, bytes of a device and median seconds, between two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, __file__, f"--wire={address}/{i}"], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    out, _ = [process.communicate()[0] for process in both]
    rows = [line.split()[1:] for line in out.splitlines() if line.startswith("row ")]
    return [
        {"kind": kind, "bytes": int(size), "median_seconds": float(seconds)}
        for kind, size, seconds in rows
    ]


def main() -> None:
    """Measures all three, prints and writes them."""
    if _WIRE.value:
        return _one_of_two(_WIRE.value)
    if _FAKE_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _FAKE_DEVICES.value)
    result = {
        "what": "what dividing a training step over devices costs; see experiments/scaling.py",
        **provenance(jax.device_count()),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "wire": wire(),
        "crossing": crossing([int(length) for length in _LENGTHS.value]),
        "throughput": throughput(),
    }
    write_json(Path(_OUT.value), result)
    for row in result["wire"]:
        print(f"{row['kind']:20}{row['bytes']:12,} bytes  {1e3 * row['median_seconds']:9.3f} ms")
    for row in result["crossing"]:
        print(f"{row['attention']:16}{row['length']:8,}  {row['collectives']}")
    for row in result["throughput"]:
        way = f"{row['config']:12}{row['data']} x {row['seq']}  {row['backend']:10}"
        print(way + f"{1e3 * row['median_seconds']:9.1f} ms")
    return None


if __name__ == "__main__":
    cli.run(main)
