"""Trains a classifier on sequences of a million tokens, each divided over several devices.

    python -m experiments.benchmarks.long_sequences                    # 8 fake devices of a CPU
    python -m experiments.benchmarks.long_sequences --fake_devices=0   # the devices that there are

For 1, 2, 4, ... parts of the sequence: what a device needs in memory, what it sends, and the time
of a step; with the most parts it trains. The model is the paper's (2 layers, width 64, 2 heads of
32, Skyformer with 128 landmarks), with positions that need no table and blocks that are computed
again in the backward pass. The data are made up here: bytes, of which the upper 128 are more
frequent than the lower ones, or less, and the question is which. Fake devices share the
cores, so that their steps are no faster; memory and traffic are those of a real one. Writes JSON
with commit, versions and hardware, and a picture.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any

# With fewer threads than devices, collectives of fake devices can wait for each other for ever.
os.environ.setdefault("NPROC", "16")

import jax
import ml_collections
import numpy as np
from absl import flags

from configs import common
from experiments.benchmarks.collectives import collectives
from experiments.provenance import provenance, write_json
from skyformer_jax import cli
from skyformer_jax.data.batches import Batch
from skyformer_jax.models import build_model
from skyformer_jax.progress import say
from skyformer_jax.training import mesh as meshes
from skyformer_jax.training import steps

_LENGTH = flags.DEFINE_integer("length", 2**20, "Tokens of a sequence.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 16, "Training steps with the most parts.", lower_bound=2)
_FAKE_DEVICES = flags.DEFINE_integer("fake_devices", 8, "Of a CPU; 0: the real ones.")
_OUT = flags.DEFINE_string("out", "results/long_sequences.json", "File to write.")
_TILT = 0.2  # the upper bytes' share is 0.5 plus or minus this


def make_config(length: int, num_steps: int) -> ml_collections.ConfigDict:
    """The paper's model for that length, and a schedule for so few steps."""
    config = common.paper_config("text", "skyformer", max_length=length)
    config.model.update({"positions": "sinusoidal", "remat": True})
    config.train.update(
        {"num_steps": num_steps, "warmup_steps": 2, "learning_rate": 1e-3, "batch_size": 2}
    )
    return config


def make_batch(length: int, step: int) -> Batch:
    """One sequence of either label, with the axes of steps and seeds."""
    rng, label = np.random.default_rng((0, step)), np.array([0, 1], np.int32)
    upper = rng.random((2, length), np.float32) < 0.5 + _TILT * (2 * label[:, None] - 1)
    tokens = rng.integers(0, 128, (2, length), np.uint8) + 128 * upper.astype(np.uint8)
    return Batch(tokens[None, None], np.full((1, 1, 2), length, np.int32), label[None, None])


def measure(config: ml_collections.ConfigDict, parts: int, num_steps: int) -> dict[str, Any]:
    """Compiles and takes steps with every sequence in so many parts.

    Returns:
      parts; bytes of temporaries, arguments and results on a device; collectives of a device,
      by kind; seconds of each step after the first; the losses.
    """
    length = config.model.max_length
    mesh = meshes.make_mesh(1, parts, jax.devices()[:parts])
    model = build_model(config, axis_name=meshes.sequence_axis(mesh))
    optimizer = steps.make_optimizer(config)
    init = jax.jit(
        lambda: steps.init_states([config.seed], model, optimizer, (length,)),
        out_shardings=meshes.replicated(mesh),
    )
    step = steps.make_train_step(model, optimizer, mesh, 1, steps.Reading(shift=1))
    states = init()

    def placed(i: int) -> Batch:
        return meshes.shard_batch(make_batch(length, i), mesh, axis=2)

    compiled = step.lower(states, placed(0)).compile()
    memory = compiled.memory_analysis()
    row = {
        "parts": parts,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
        "seconds": [],
        "loss": [],
    }
    say(f"{parts} part(s): {memory.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries a device")
    for i in range(num_steps):
        batch, start = placed(i), time.perf_counter()
        states, sums = compiled(states, batch)
        row["loss"].append(float(sums["loss"][0] / sums["examples"][0]))
        seconds = time.perf_counter() - start
        if i:  # the first one also warms
            row["seconds"].append(seconds)
        say(f"  step {i + 1}/{num_steps}  loss {row['loss'][-1]:.4f}  {seconds:.1f} s")
    row["median_seconds"] = statistics.median(row["seconds"])
    return row


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory of a device against the parts, and the loss."""
    from matplotlib.figure import Figure  # imported late: it is slow to load

    rows = result["rows"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, loss = figure.subplots(1, 2)
    parts = [row["parts"] for row in rows]
    mebibytes = [row["temporaries_bytes"] / 2**20 for row in rows]
    memory.loglog(parts, mebibytes, "o-", label="temporaries of a device")
    memory.loglog(parts, [mebibytes[0] / n for n in parts], "--", color="gray", label="1 / parts")
    memory.set(xlabel="parts of the sequence", ylabel="MiB", xticks=parts, xticklabels=parts)
    memory.minorticks_off()
    memory.legend()
    steps_taken = range(1, len(rows[-1]["loss"]) + 1)
    loss.plot(steps_taken, rows[-1]["loss"], "o-")
    loss.axhline(np.log(2), ls="--", color="gray")
    loss.set(
        xlabel="step", ylabel="loss, nats", title=f"{result['length']:,} tokens, {parts[-1]} parts"
    )
    for axis in (memory, loss):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures with 1, 2, 4, ... parts, trains with the most, writes JSON and picture."""
    if _FAKE_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _FAKE_DEVICES.value)
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
        "seed": config.seed,
        "steps": _STEPS.value,
        "rows": rows,
    }
    out = Path(_OUT.value)
    write_json(out, result)
    plot(result, out.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['parts']} part(s): {row['temporaries_bytes'] / 2**20:8,.0f} MiB, "
            f"{row['median_seconds']:6.1f} s a step, sends {row['collectives']}"
        )


if __name__ == "__main__":
    cli.run(main)
