"""Models a training step on up to 16 million tokens: Skyformer, and exact attention in a ring.

    python -m experiments.benchmarks.cost_model

The model is arithmetic over constants that were measured here: of two CPU cores, and of the wire
between two processes on them. It predicts how the time t of a step grows with the length n and the
number of devices S, all along the sequence, for the paper's model (2 layers, width 64) and one
sequence:

    Skyformer       t = n/S (r + L a) + its collectives on the wire
    exact, a ring   t = n/S r + L max(n^2/S b, 3 S passes on the wire) + those collectives

with L layers, r seconds per token for everything but the attention, a seconds per token for
Skyformer's attention, and b seconds per pair of tokens for exact attention, forward and backward. b
is that of the chunked Gaussian kernel: like softmax attention in a ring it stores no scores, and it
has as many matrix products; dense softmax takes 4 to 13 times as long here, from 4,096 tokens on. A
ring's passes are hidden behind its products where they are shorter. An all-reduce over S devices
takes log2(S) times the latency of one between two, and 2 (S - 1) / S times the bytes. Reads
results/, and writes JSON and a picture. There is no --small, because nothing is measured.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments.palette import STYLES
from experiments.records import Row, provenance, read_json, write_json
from skyformer_jax import cli

_RESULTS = flags.DEFINE_string("results", "results", "Folder of the measurements; gets the result.")
_LENGTHS = tuple(4**i for i in range(6, 13))  # 4,096 to 16,777,216
_DEVICES = (1, 8, 64, 256)
_LAYERS, _WIDTH = 2, 64
_GRADIENTS = {"pass": "gradients"}


def constants(folder: Path) -> dict[str, Any]:
    """Reads the constants of the formulas, in seconds, bytes and bytes per second, with sources."""

    def read(name: str) -> Any:
        return read_json(folder / f"{name}.json")

    def longest(rows: list[Row], **fields: str) -> Row:
        rows = [row for row in rows if fields.items() <= row.items() and "skipped" not in row]
        return max(rows, key=lambda row: row["length"])

    skyformer = longest(read("speed_skyformer")["cells"], attention="skyformer", **_GRADIENTS)
    exact = longest(read("speed_cpu")["cells"], attention="kernelized", **_GRADIENTS)
    step, scaling = read("step_speed_text"), read("scaling")
    step_seconds = step["attentions"]["skyformer"]["median_seconds_per_step"]
    token = skyformer["median_seconds"] / skyformer["length"]
    wire = {}
    for kind in ("all-reduce", "collective-permute"):
        rows = [row for row in scaling["wire"] if row["kind"] == kind]
        large = max(rows, key=lambda row: row["bytes"])
        wire[kind] = {
            "latency": min(row["median_seconds"] for row in rows),
            "bandwidth": large["bytes"] / large["median_seconds"],
        }
    return {
        "skyformer_token": {
            "value": token,
            "of": f"results/speed_skyformer.json, {skyformer['length']}",
        },
        "pair": {
            "value": exact["median_seconds"] / exact["length"] ** 2,
            "of": f"results/speed_cpu.json, kernelized, {exact['length']}",
        },
        "rest_token": {
            "value": step_seconds / (step["batch_size"] * step["length"]) - _LAYERS * token,
            "of": "results/step_speed_text.json, less the attention's",
        },
        "wire": {**wire, "of": "results/scaling.json, two processes on 127.0.0.1"},
        "collectives": {
            **longest(scaling["crossing"], attention="skyformer")["collectives"],
            "of": "results/scaling.json",
        },
    }


def step_time(known: dict[str, Any], n: int, devices: int) -> dict[str, dict[str, float]]:
    """Computes seconds of a step and bytes that a device sends, for both, by the formulas above."""
    own = n / devices
    rest = own * known["rest_token"]["value"]
    skyformer = rest + own * _LAYERS * known["skyformer_token"]["value"]
    ring = n * own * known["pair"]["value"]
    sent = wire = ring_sent = passes = 0.0
    if devices > 1:
        reduce, passing = known["wire"]["all-reduce"], known["wire"]["collective-permute"]
        for kind, factor in (("all-reduce", 2), ("all-gather", 1)):
            row = known["collectives"][kind]
            num_bytes = row["bytes"] * (factor * (devices - 1) / devices)
            sent += num_bytes
            wire += row["count"] * math.log2(devices) * reduce["latency"]
            wire += num_bytes / reduce["bandwidth"]
        # Keys and values pass in the forward pass, these and their gradients in the backward pass.
        ring_sent = 6 * own * _WIDTH * 4 * devices
        passes = 3 * devices * passing["latency"] + ring_sent / passing["bandwidth"]
    return {
        "skyformer": {"seconds": skyformer + wire, "wire_seconds": wire, "sent_bytes": sent},
        "exact": {
            "seconds": rest + _LAYERS * max(ring, passes) + wire,
            "wire_seconds": _LAYERS * passes,
            "sent_bytes": _LAYERS * ring_sent + sent,
        },
    }


def plot(rows: list[Row], path: Path) -> None:
    """Plots seconds and bytes against the length, for each number of devices."""
    figure, (seconds, sent) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for shade, devices in zip(np.linspace(0.35, 1, len(_DEVICES)), _DEVICES, strict=True):
        of_devices = [row for row in rows if row["devices"] == devices]
        lengths = [row["length"] for row in of_devices]
        for name, label, color_of in (
            ("skyformer", "Skyformer", "skyformer"),
            ("exact", "exact, a ring", "kernelized"),
        ):
            style = {"color": STYLES[color_of][0], "alpha": shade, "marker": "."}
            values = [row[name]["seconds"] for row in of_devices]
            seconds.loglog(lengths, values, label=f"{label}, {devices}", **style)
            if devices > 1:
                sent.loglog(lengths, [row[name]["sent_bytes"] for row in of_devices], **style)
    seconds.set(xlabel="tokens", ylabel="seconds of a step, modelled")
    sent.set(xlabel="tokens", ylabel="bytes that a device sends in a step")
    seconds.legend(fontsize=7, title="devices", title_fontsize=7)
    for axis in (seconds, sent):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Evaluates the model over lengths and devices."""
    folder = Path(_RESULTS.value)
    known = constants(folder)
    rows = [
        {"length": n, "devices": devices, **step_time(known, n, devices)}
        for n in _LENGTHS
        for devices in _DEVICES
    ]
    result = {
        "what": "a modelled training step, not a measurement: experiments/benchmarks/cost_model.py",
        **provenance(1),
        "constants": known,
        "rows": rows,
    }
    write_json(folder / "cost_model.json", result)
    plot(rows, folder / "cost_model.png")


if __name__ == "__main__":
    cli.run(main)
