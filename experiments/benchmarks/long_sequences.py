"""Trains a classifier on sequences of a million tokens, each divided over several devices.

    python -m experiments.benchmarks.long_sequences                   # 8 fake devices of a CPU
    python -m experiments.benchmarks.long_sequences --fake_devices=0  # the real devices

Measures, for 1, 2, 4, ... shards of the sequence, the memory of a device, what it sends, and the
time of a step; trains with the most shards. The model is the paper's (2 layers, width 64, 2 heads
of 32, Skyformer with 128 landmarks), with positions that need no table and blocks that are
recomputed in the backward pass. The data are generated: random bytes, of which the upper 128 values
are either more or less frequent than the lower ones; the label says which. Fake devices share the
CPU cores, so more of them make steps no faster; memory and traffic are those of a real device.
Writes JSON with commit, versions and hardware, and a picture. --small uses 1,024 tokens, two
devices and two steps.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import ml_collections
import numpy as np
from absl import flags

from configs import common
from experiments.benchmarks import common_flags
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.timing import lower_train_step, memory
from experiments.records import provenance, write_json
from skyformer_jax import cli
from skyformer_jax.data.batches import Batch
from skyformer_jax.progress import say
from skyformer_jax.training.mesh import make_mesh, shard_batch
from skyformer_jax.training.run import make_run
from skyformer_jax.training.state import init_states

_LENGTH = flags.DEFINE_integer("length", 2**20, "Tokens of a sequence.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 16, "Training steps with the most shards.", lower_bound=2)
_FAKE_DEVICES = common_flags.fake_devices()
_SMALL = common_flags.small()
_OUT = common_flags.out("results/long_sequences.json")
_TILT = 0.2  # the upper bytes' share is 0.5 plus or minus this


def make_config(length: int, num_steps: int) -> ml_collections.ConfigDict:
    """Returns the config of the paper's model for a length, with a schedule for a few steps."""
    config = common.paper_config("text", "skyformer", max_length=length)
    config.model.update({"positions": "sinusoidal", "remat": True})
    config.train.update({"num_steps": num_steps, "warmup_steps": 2, "learning_rate": 1e-3})
    config.train.update({"batch_size": 2, "log_every": 1})
    return config


def make_batch(length: int, step: int) -> Batch:
    """Makes a batch with one sequence of each label, [seeds, batch, ...] for one seed."""
    rng, label = np.random.default_rng((0, step)), np.array([0, 1], np.int32)
    upper = rng.random((2, length), np.float32) < 0.5 + _TILT * (2 * label[:, None] - 1)
    tokens = rng.integers(0, 128, (2, length), np.uint8) + 128 * upper.astype(np.uint8)
    return Batch(tokens[None], np.full((1, 2), length, np.int32), label[None])


def measure(config: ml_collections.ConfigDict, shards: int, num_steps: int) -> dict[str, Any]:
    """Compiles and takes training steps with every sequence split into `shards` shards.

    Returns:
      parts, the number of shards; bytes of temporaries, arguments and results on a device;
      collectives of a device, by kind; seconds of each step after the first, and their median;
      the losses.
    """
    run = make_run(config, make_mesh(1, shards, jax.devices()[:shards]))

    def sharded_batch(i: int) -> Batch:
        return shard_batch(make_batch(config.model.max_length, i), run.mesh, axis=1)

    compiled = lower_train_step(run, sharded_batch(0)).compile()
    row = {
        "parts": shards,
        **memory(compiled),
        "collectives": collectives(compiled.as_text()),
        "seconds": [],
        "loss": [],
    }
    say(f"{shards} shard(s): {row['temporaries_bytes'] / 2**20:,.0f} MiB of temporaries a device")
    states = init_states(run)
    for i in range(num_steps):
        batch, start = sharded_batch(i), time.perf_counter()
        states, sums = compiled(states, batch)
        row["loss"].append(float(sums["loss"][0] / sums["examples"][0]))
        row["seconds"].append(time.perf_counter() - start)
        say(f"  step {i + 1}/{num_steps}  loss {row['loss'][-1]:.4f}  {row['seconds'][-1]:.1f} s")
    del row["seconds"][0]  # the first step is a warm-up
    row["median_seconds"] = statistics.median(row["seconds"])
    return row


def plot(result: dict[str, Any], path: Path) -> None:
    """Plots the memory of a device against the shards, and the loss against the step."""
    rows = result["rows"]
    shards = [row["parts"] for row in rows]
    mebibytes = [row["temporaries_bytes"] / 2**20 for row in rows]
    losses = rows[-1]["loss"]
    figure, (size, loss) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    size.loglog(shards, mebibytes, "o-", label="temporaries of a device")
    ideal = [mebibytes[0] / n for n in shards]
    size.loglog(shards, ideal, "--", color="gray", label="1 / shards")
    size.set(xlabel="shards of the sequence", ylabel="MiB", xticks=shards, xticklabels=shards)
    size.minorticks_off()
    size.legend()
    loss.plot(range(1, len(losses) + 1), losses, "o-")
    loss.axhline(np.log(2), ls="--", color="gray")
    title = f"{result['length']:,} tokens, {shards[-1]} shards"
    loss.set(xlabel="step", ylabel="loss, nats", title=title)
    for axis in (size, loss):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures with 1, 2, 4, ... shards, trains with the most, and writes JSON and picture."""
    if _SMALL.value:
        common_flags.set_defaults(length=1024, fake_devices=2, steps=2)
    common_flags.use_fake_devices(_FAKE_DEVICES)
    config = make_config(_LENGTH.value, _STEPS.value)
    counts = [n for n in (2**i for i in range(20)) if n <= jax.device_count()]
    rows = [measure(config, n, _STEPS.value if n == counts[-1] else 2) for n in counts]
    result = {
        "what": "training steps of the paper's model on one sequence, divided over the devices",
        "data": f"made up: shares of the upper 128 byte values are 0.5 + or - {_TILT}",
        "attention": config.attention.to_dict(),
        "model": config.model.to_dict(),
        "train": config.train.to_dict(),
        "length": _LENGTH.value,
        **provenance(jax.device_count()),
        "small": _SMALL.value,
        "seed": config.seed,
        "steps": _STEPS.value,
        "rows": rows,
    }
    out = Path(_OUT.value)
    write_json(out, result)
    plot(result, out.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
