"""A training step on sequences of up to 16 million tokens, on paper: Skyformer, and a ring.

    python -m experiments.benchmarks.cost_model

A model of arithmetic, with constants that were measured here and nothing else: of two CPU cores,
and of the wire between two processes of theirs. It says how a step would grow with the length n and
the devices S, all along the sequence, for the paper's model (2 layers, width 64) and one sequence:

    Skyformer       t = n/S (r + L a) + its collectives on the wire
    exact, a ring   t = n/S r + L max(n^2/S b, 3 S passes on the wire) + those collectives

with L layers; r seconds a token for all but the attention, a for Skyformer's attention, b for a
pair of tokens in exact attention, forward and backward. b is that of the chunked Gaussian kernel:
like softmax attention in a ring it holds no scores, and it has as many matrix products; dense
softmax takes 4 to 13 times as long here, from 4,096 tokens on. A ring's passes are counted as
hidden behind its products where they are shorter. An all-reduce over S takes log2(S) times the
latency of one between two, and 2 (S - 1) / S times the bytes. Reads results/, writes JSON and a
picture. It measures nothing, so that there is nothing to reduce by --small.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.palette import STYLES
from experiments.records import provenance, read_json, write_json
from skyformer_jax import cli

_RESULTS = flags.DEFINE_string("results", "results", "Folder of the measurements, and for this.")
_LENGTHS = tuple(4**i for i in range(6, 13))  # 4,096 to 16,777,216
_DEVICES = (1, 8, 64, 256)
_LAYERS, _WIDTH = 2, 64


def constants(folder: Path) -> dict[str, Any]:
    """What the formulas need, in seconds, bytes and bytes per second, and where each is from."""

    def longest(name: str, attention: str) -> dict[str, Any]:
        cells = [
            cell
            for cell in read_json(folder / name)["cells"]
            if (cell["attention"], cell["pass"]) == (attention, "gradients")
            and "median_seconds" in cell
        ]
        return max(cells, key=lambda cell: cell["length"])

    skyformer = longest("speed_skyformer.json", "skyformer")
    exact = longest("speed_cpu.json", "kernelized")
    step = read_json(folder / "step_speed_text.json")
    tokens = step["batch_size"] * step["length"]
    a = skyformer["median_seconds"] / skyformer["length"]
    scaling = read_json(folder / "scaling.json")
    crossing = max(
        (row for row in scaling["crossing"] if row["attention"] == "skyformer"),
        key=lambda row: row["length"],
    )
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
            "value": a,
            "of": f"results/speed_skyformer.json, {skyformer['length']}",
        },
        "pair": {
            "value": exact["median_seconds"] / exact["length"] ** 2,
            "of": f"results/speed_cpu.json, kernelized, {exact['length']}",
        },
        "rest_token": {
            "value": step["attentions"]["skyformer"]["median_seconds_per_step"] / tokens
            - _LAYERS * a,
            "of": "results/step_speed_text.json, less the attention's",
        },
        "wire": {**wire, "of": "results/scaling.json, two processes on 127.0.0.1"},
        "collectives": {**crossing["collectives"], "of": "results/scaling.json"},
    }


def step_time(known: dict[str, Any], n: int, devices: int) -> dict[str, dict[str, float]]:
    """Seconds of a step and bytes that a device sends, for both, by the formulas above."""
    reduce, passing = known["wire"]["all-reduce"], known["wire"]["collective-permute"]
    own = n / devices
    rest = own * known["rest_token"]["value"]
    sky_sent, sky_wire = 0.0, 0.0
    if devices > 1:
        for kind in ("all-reduce", "all-gather"):
            row = known["collectives"][kind]
            factor = (2 if kind == "all-reduce" else 1) * (devices - 1) / devices
            sky_sent += row["bytes"] * factor
            sky_wire += row["count"] * math.log2(devices) * reduce["latency"]
            sky_wire += row["bytes"] * factor / reduce["bandwidth"]
    sky = rest + own * _LAYERS * known["skyformer_token"]["value"]
    # Keys and values pass in the forward pass, these and their gradients in the backward pass.
    part = own * _WIDTH * 4
    ring_sent = 6 * part * devices if devices > 1 else 0.0
    passes = 3 * devices * passing["latency"] + ring_sent / passing["bandwidth"]
    ring = n * own * known["pair"]["value"]
    ring = max(ring, passes) if devices > 1 else ring
    return {
        "skyformer": {"seconds": sky + sky_wire, "wire_seconds": sky_wire, "sent_bytes": sky_sent},
        "exact": {
            "seconds": rest + _LAYERS * ring + sky_wire,
            "wire_seconds": _LAYERS * passes if devices > 1 else 0.0,
            "sent_bytes": _LAYERS * ring_sent + sky_sent,
        },
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and bytes against the length, for each number of devices."""
    from matplotlib.figure import Figure  # imported late: it is slow to load

    figure = Figure(figsize=(10, 4), layout="constrained")
    seconds, sent = figure.subplots(1, 2)
    ours, ring = STYLES["skyformer"][0], STYLES["kernelized"][0]
    for shade, devices in zip(np.linspace(0.35, 1, len(_DEVICES)), _DEVICES, strict=True):
        of_devices = [row for row in rows if row["devices"] == devices]
        for name, color in (("skyformer", ours), ("exact", ring)):
            lengths = [row["length"] for row in of_devices]
            style = {"color": color, "alpha": shade, "marker": "."}
            label = f"{'Skyformer' if name == 'skyformer' else 'exact, a ring'}, {devices}"
            seconds.loglog(
                lengths, [row[name]["seconds"] for row in of_devices], label=label, **style
            )
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
    print(
        "| tokens | devices | Skyformer, s | sends | exact, s | sends |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        cells = [f"{row['length']:,}", str(row["devices"])]
        for name in ("skyformer", "exact"):
            cells += [f"{row[name]['seconds']:,.3g}", f"{row[name]['sent_bytes'] / 2**20:,.3g} MiB"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    cli.run(main)
