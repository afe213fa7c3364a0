"""Measures what dividing a step over devices costs: throughput, bytes sent, and the wire.

    python -m experiments.benchmarks.scaling

Throughput: the quickstart's step with its batch divided over 1, 2, 4, 8 devices, by shard_map and
by pmap, and a step of the Text model (length 4,096, batch 4) with its sequences divided; they take
turns in one process. Fake devices share the CPU cores, so this shows what dividing costs, not what
it gains. Bytes: what a device sends in a step of the Text model with sequences in 8 shards, for
every attention that can be divided and several lengths, according to the compiled programs. Wire:
seconds of an all-reduce and of a ring's pass between two processes on 127.0.0.1. Writes JSON with
commit, versions and hardware. --small uses two devices, but no single one, the small Text at a
length of 256, the bytes of Skyformer only, messages of up to 4 KiB and one round.
"""

import concurrent.futures
import itertools
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import quickstart, text
from experiments.benchmarks import common_flags
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.timing import as_text, lower_train_step, random_batch, time_steps
from experiments.records import Row, provenance, write_json
from skyformer_jax import attention, cli
from skyformer_jax.progress import track
from skyformer_jax.training.mesh import make_mesh
from skyformer_jax.training.run import Run, make_run

_FAKE_DEVICES = common_flags.fake_devices()
_ROUNDS = common_flags.rounds(5)
_SMALL = common_flags.small()
_OUT = common_flags.out("results/scaling.json")


def _run(config: ml_collections.ConfigDict, data: int, seq: int) -> Run:
    """Makes a run on the first data x seq devices, without gradient accumulation."""
    config.train.accumulation = 1
    return make_run(config, make_mesh(data, seq, jax.devices()[: data * seq]))


def _text(name: str, batch_size: int, length: int) -> ml_collections.ConfigDict:
    config = text.get_config(f"{name},small" if _SMALL.value else name)
    config.model.max_length, config.train.batch_size = length, batch_size
    return config


def throughput() -> list[Row]:
    """Measures steps of two models; returns rows of config, data, seq, backend and seconds."""
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()][-1 if _SMALL.value else 0 :]
    runs = {}
    for backend, n in itertools.product(("shard_map", "pmap"), counts):
        config = quickstart.get_config()
        config.parallel.backend = backend
        runs["quickstart", n, 1, backend] = _run(config, n, 1)
    for n in counts:
        config = _text("skyformer", 4, 256 if _SMALL.value else 4096)
        runs["text", 1, n, "shard_map"] = _run(config, 1, n)
    rows = time_steps(runs, _ROUNDS.value, "steps")
    fields = ("config", "data", "seq", "backend")
    return [{**dict(zip(fields, way, strict=True)), **row} for way, row in rows.items()]


def crossing(names: Sequence[str], lengths: Sequence[int]) -> list[Row]:
    """Returns rows of attention, length and the bytes between devices in a step, by kind."""
    rows, shards = [], jax.device_count()
    cells = list(itertools.product(names, lengths))
    for name, length in track(cells, len(cells), "bytes between devices", "programs"):
        config = _text(name, 1, length)
        config.model.positions = "sinusoidal"
        run = _run(config, 1, shards)
        program = lower_train_step(run, random_batch(run)).compile()
        sent = collectives(program.as_text())
        rows.append({"attention": name, "length": length, "parts": shards, "collectives": sent})
    return rows


def _time_collectives(address: str, index: int, sizes: Sequence[int]) -> list[Row]:
    """Measures the rows of wire; two processes call this, and process 0 has the address."""
    jax.distributed.initialize(address, num_processes=2, process_id=index)
    mesh, along = jax.sharding.Mesh(np.array(jax.devices()), ("wire",)), P("wire")
    kinds = {
        "all-reduce": lambda x: jax.lax.psum(x, "wire"),
        "collective-permute": lambda x: jax.lax.ppermute(x, "wire", [(0, 1), (1, 0)]),
    }
    rows = []
    for (kind, function), size in itertools.product(kinds.items(), sizes):
        call = jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
        )
        x = jnp.zeros(2 * size // 4, device=NamedSharding(mesh, along))
        seconds = []
        for _ in range(21):
            start = time.perf_counter()
            jax.block_until_ready(call(x))
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[1:])
        rows.append({"kind": kind, "bytes": size, "median_seconds": median})
    jax.distributed.shutdown()
    return rows


def wire() -> list[Row]:
    """Returns rows of kind, bytes of a device and median seconds, between two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    sizes = [4**i for i in range(5, 7 if _SMALL.value else 13)]  # 1 KiB to 16 MiB
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawn) as pool:
        of_first, _ = pool.map(_time_collectives, [address] * 2, range(2), [sizes] * 2)
    return of_first


def main() -> None:
    """Measures all three, and prints and writes the results."""
    names, lengths = attention.SPLITTABLE, (1024, 4096, 16_384)
    if _SMALL.value:
        names, lengths = ("skyformer",), (256,)
        common_flags.set_defaults(fake_devices=2, rounds=1)
    common_flags.use_fake_devices(_FAKE_DEVICES)
    result = {
        "what": "what dividing a training step over devices costs: throughput, bytes, wire",
        **provenance(jax.device_count()),
        "seed": 0,
        "rounds": _ROUNDS.value,
        "small": _SMALL.value,
        "wire": wire(),
        "crossing": crossing(names, lengths),
        "throughput": throughput(),
    }
    write_json(Path(_OUT.value), result)
    print(as_text(result["wire"], "kind", "bytes"))
    print(as_text(result["throughput"], "config", "data", "seq", "backend"))


if __name__ == "__main__":
    cli.run(main)
