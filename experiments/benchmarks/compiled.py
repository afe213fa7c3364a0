"""Compiles training steps for TPUs and GPUs that this machine lacks, and counts their costs.

    python -m experiments.benchmarks.compiled --platform=tpu --topology=v5e:2x4 \
        --config=configs/text.py:skyformer --mesh=8,1 --config.train.batch_size=16
    python -m experiments.benchmarks.compiled --platform=cuda --topology=h100:8 --table

XLA's own compilers run on a CPU: for TPUs with libtpu (pip install ".[aot]"), for NVIDIA GPUs with
JAX's CUDA wheels (docs/compiled.md). The step is exactly the one that train.py would run, on a
data x seq mesh of the topology's devices. Nothing is executed, so nothing is measured. Cycles are
XLA's estimates for TPUs, at the clock rate "hertz" of the row, and count a loop once per iteration.
XLA does not estimate the cycles of a kernel; they come from a model over the device's peaks and,
for TPUs with --schedules, from the compiler's schedule (docs/compiled.md). Bytes are the traffic
through main memory by the compiled text, and what the devices send each other is counted.

--stock computes softmax with JAX's own kernel for TPUs. --table compiles the rows of
docs/compiled.md for the platform and the topology, one after another. --hlo writes the compiled
text. In --out, a new row replaces an earlier row of the same step.
"""

import contextlib
import dataclasses
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from experiments.benchmarks import common_flags
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.hlo import Program, parse
from experiments.benchmarks.program_costs import PEAKS, costs, is_kernel
from experiments.benchmarks.stock_attention import stock_softmax
from experiments.benchmarks.timing import abstract_batch, attempt, lower_train_step, memory
from experiments.benchmarks.tpu_schedule import scheduled_cycles, write_schedules_to
from experiments.records import Row, provenance, read_json, write_json
from skyformer_jax import attention, cli
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say
from skyformer_jax.training.config import check
from skyformer_jax.training.mesh import make_mesh
from skyformer_jax.training.run import make_run

_PLATFORM = flags.DEFINE_enum("platform", "tpu", ("tpu", "cuda"), "Platform to compile for.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:2x4", "A TPU slice, such as v5e:2x4, or a number of GPUs, such as h100:8."
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/text.py:ATTENTION[,VARIANT].", lock_config=True
)
_MESH = flags.DEFINE_list("mesh", ["-1", "1"], "Devices along data and along seq; -1: the rest.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Examples in a batch; default: the config's."
)
_STOCK = flags.DEFINE_bool("stock", False, "Compute softmax with JAX's kernel for TPUs.")
_SCHEDULES = flags.DEFINE_bool(
    "schedules",
    False,
    "Also record the cycles that the compiler schedules for TPU kernels; slower.",
)
_HLO = flags.DEFINE_string("hlo", None, "File to write the compiled text to.")
_TABLE = flags.DEFINE_bool("table", False, "Compile the rows of the table instead of one config.")
_OUT = common_flags.out("results/compiled.json")

_TARGETS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile.

    Attributes:
      config: the config, in the form of --config.
      data: devices along data.
      seq: devices along seq.
      changes: overrides of the config by dotted names.
      stock: whether softmax attention uses JAX's own kernel for TPUs.
    """

    config: str
    data: int
    seq: int
    changes: dict[str, Any]
    stock: bool = False


def table(platform: str, topology: str) -> list[Case]:
    """Returns the cases of the table for a topology.

    Raises:
      UserError: if the table has no cases for it.
    """
    text = "configs/text.py:"
    one_document = {"train.batch_size": 1, "model.positions": "sinusoidal"}
    cases = {
        ("tpu", "v5e:2x4"): [Case(text + name, 8, 1, {}) for name in attention.NAMES]
        + [Case(text + "softmax", 8, 1, {}, stock=True)]
        + [Case(text + name, 2, 4, {}) for name in attention.SPLITTABLE]
        + [Case(text + "skyformer", 1, 1, {"train.batch_size": 8})],
        ("tpu", "v5e:16x16"): [
            Case(text + "skyformer", 1, 256, {**one_document, "model.max_length": 2**power})
            for power in (20, 24)
        ],
        ("cuda", "h100:1"): [Case(text + name, 1, 1, {}) for name in attention.NAMES],
        ("cuda", "h100:8"): [
            Case(text + "skyformer", 8, 1, {}),
            Case(text + "skyformer", 2, 4, {}),
        ],
    }
    if (platform, topology) not in cases:
        raise UserError(
            f"the table has nothing for {platform} {topology}; it has: "
            + ", ".join(" ".join(key) for key in cases)
        )
    return cases[platform, topology]


def described_devices(platform: str, topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, to compile for.

    Raises:
      UserError: if the topology is unknown, or XLA's compiler for the platform is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing is executed
    if platform == "tpu":
        # libtpu then looks neither for a TPU machine nor for other processes that use libtpu.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options: dict[str, Any] = {"topology_name": topology}
    else:
        name, _, count = topology.partition(":")
        target = _TARGETS / f"{name}.textproto"
        if not target.is_file() or not count.isdigit():
            known = ", ".join(f"{path.stem}:8" for path in sorted(_TARGETS.glob("*.textproto")))
            raise UserError(f"--topology={topology} is not a number of GPUs, such as {known}")
        cuda = Path(sys.prefix, f"lib/python{sys.version_info[0]}.{sys.version_info[1]}")
        cuda = cuda / "site-packages/nvidia/cu13"
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        flag = f"--xla_gpu_cuda_data_dir={cuda}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        options = {
            "topology_name": "",
            "topology": f"1x1x{count}",
            "target_config": target.read_text(),
        }
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError, ImportError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot compile for {platform} {topology}: {text}; docs/compiled.md says what it needs"
        ) from None


def _config_of(case: Case) -> ml_collections.ConfigDict:
    path, _, argument = case.config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(argument)
    config.update_from_flattened_dict(case.changes)
    return config


def compile_step(
    config: ml_collections.ConfigDict,
    devices: list[jax.Device],
    data: int,
    seq: int,
    scheduled: Callable[[Program], Mapping[str, int]] | None = None,
) -> tuple[Row, str]:
    """Compiles a training step for the first data x seq devices.

    Args:
      config: the config of the step.
      devices: the devices to compile for.
      data: devices along data.
      seq: devices along seq.
      scheduled: returns the cycles that the compiler has just scheduled, by kernel.

    Returns:
      The row of the step, and the compiled text. If XLA refuses the step, the row has skipped, the
      reason, and the text is empty.

    Raises:
      UserError: if there are too few devices, or for the first config field that cannot work.
    """
    config = config.copy_and_resolve_references()
    config.parallel.data, config.parallel.seq = data, seq
    if data * seq > len(devices):
        raise UserError(f"--mesh={data},{seq} needs {data * seq} devices; got {len(devices)}")
    check(config, data * seq)
    run = make_run(config, make_mesh(data, seq, devices[: data * seq]))
    kind = devices[0].device_kind
    peaks = PEAKS.get(kind)
    row: Row = {
        "device": f"{data * seq} x {kind}",
        "attention": config.attention.name,
        "task": config.task,
        "data": data,
        "seq": seq,
        "batch_size": config.train.batch_size,
        "length": config.model.max_length,
        "hertz": None if peaks is None else peaks.hertz,
    }
    start = time.perf_counter()
    lowered = lower_train_step(run, abstract_batch(run))
    lowering = time.perf_counter() - start
    program, reason = attempt(lowered.compile, math.inf)
    seconds = {
        "lower_seconds": lowering,
        "compile_seconds": time.perf_counter() - start - lowering,
    }
    if program is None:
        return row | seconds | {"skipped": reason}, ""
    text = program.as_text()
    parsed = parse(text)
    of_kernels = None if scheduled is None else scheduled(parsed)
    found = costs(parsed, peaks, of_kernels) | {"collectives": collectives(text)}
    return row | seconds | memory(program) | found, text


def as_text(row: Row) -> str:
    """Formats a row: cycles, bytes, memory, kernels, collectives, and costs by purpose."""
    title = (
        f"{row['platform']} {row['topology']}, {row['data']} x {row['seq']} devices, {row['task']} "
        f"{row['attention']}, batch {row['batch_size']}, length {row['length']:,}: "
    )
    if "skipped" in row:
        return title + row["skipped"]
    kernels = row["kernels"].values()
    modelled = sum(kernel["modelled_cycles"] for kernel in kernels)
    lines = [
        f"{title}compiled in {row['compile_seconds']:.0f} s",
        f"  {row['bytes_through_memory'] / 1e6:,.1f} MB through memory, "
        f"{row['temporaries_bytes'] / 2**20:,.1f} MiB of temporaries, "
        f"{row['argument_bytes'] / 2**20:,.1f} MiB of arguments; {row['runs']:,} instructions, "
        f"{len(row['loops'])} loops",
    ]
    if row["estimated_cycles"]:
        of_kernels = [(modelled, "by a model")]
        if kernels and all("scheduled_cycles" in kernel for kernel in kernels):
            scheduled = sum(kernel["scheduled_cycles"] for kernel in kernels)
            of_kernels.append((scheduled, "as scheduled"))
        lines += [
            f"  {row['estimated_cycles'] / 1e6:.2f} M cycles by XLA and {cycles / 1e6:.2f} M of "
            f"kernels {how}: {1e3 * (row['estimated_cycles'] + cycles) / row['hertz']:.2f} ms"
            for cycles, how in of_kernels
        ]
    elif modelled and row["hertz"]:
        seconds = modelled / row["hertz"]
        lines.append(
            f"  {modelled / 1e6:.2f} M cycles of kernels by a model: {1e3 * seconds:.2f} ms"
        )
    for name, kernel in row["kernels"].items():
        said = f"{kernel['modelled_cycles'] / 1e3:,.0f} k cycles by a model"
        said = said if kernel["estimated"] else "without an estimate"
        if "scheduled_cycles" in kernel:
            said += f", {kernel['scheduled_cycles'] / 1e3:,.0f} k as scheduled"
        lines.append(f"  kernel {name}: {kernel['runs']} times, {said}")
    for kind, sent in row["collectives"].items():
        lines.append(f"  {kind}: {sent['count']}, {sent['bytes']:,} bytes")
    for purpose, work in row["by_purpose"].items():
        lines.append(
            f"  {purpose:36} {work['runs']:6} runs {work['bytes'] / 1e6:10,.1f} MB "
            f"{work['cycles'] / 1e3:10,.0f} k cycles"
        )
    return "\n".join(lines)


def _put(path: Path, row: Row) -> None:
    """Writes the row to the file, in place of an earlier row of the same step."""
    same = ("platform", "topology", "config", "attention", "changes", "data", "seq")
    same += ("batch_size", "length")
    what = "training steps compiled ahead of time, nothing executed; cycles are XLA's estimates"
    rows = read_json(path)["rows"] if path.exists() else []
    row = {**row, "changes": dict(row["changes"])}
    rows = [old for old in rows if any(old[name] != row[name] for name in same)]
    write_json(path, {"what": what, "rows": [*rows, row]})


def _mesh_shape(num_devices: int) -> tuple[int, int]:
    try:
        data, seq = map(int, _MESH.value)
    except ValueError:
        raise UserError(f"--mesh must be DATA,SEQ; got {','.join(_MESH.value)}") from None
    data = num_devices // seq if data == -1 and seq > 0 else data
    seq = num_devices // data if seq == -1 and data > 0 else seq
    if data < 1 or seq < 1:
        raise UserError(f"--mesh must be positive, or -1 once; got {','.join(_MESH.value)}")
    return data, seq


def main() -> None:
    """Compiles each step, and prints and writes its row."""
    platform, topology = _PLATFORM.value, _TOPOLOGY.value
    if not _TABLE.value and _CONFIG.value is None:
        raise UserError("give --config=configs/FILE.py:ATTENTION, or --table")
    cases = table(platform, topology) if _TABLE.value else []
    with tempfile.TemporaryDirectory() as folder:
        schedules = Path(folder)
        if _SCHEDULES.value:
            write_schedules_to(schedules)
        devices = described_devices(platform, topology)
        jobs = [(_config_of(case), case) for case in cases]
        if not _TABLE.value:
            jobs = [_job_of_flags(len(devices))]

        def scheduled(program: Program) -> Mapping[str, int]:
            kernels = [one.name for one, *_ in program.executed() if is_kernel(one)]
            return scheduled_cycles(schedules, kernels)

        for config, case in jobs:
            with stock_softmax() if case.stock else contextlib.nullcontext():
                asked = scheduled if _SCHEDULES.value else None
                row, text = compile_step(config, devices, case.data, case.seq, asked)
            if case.stock:
                row["attention"] += ", stock splash attention"
            facts = provenance(1)
            row = {
                "platform": platform,
                "topology": topology,
                "config": case.config,
                "changes": case.changes,
                **{field: facts[field] for field in ("commit", "versions")},
                **row,
            }
            say(as_text(row))
            _put(Path(_OUT.value), row)
            if _HLO.value:
                Path(_HLO.value).write_text(text)


def _job_of_flags(num_devices: int) -> tuple[ml_collections.ConfigDict, Case]:
    changes = {} if _BATCH_SIZE.value is None else {"train.batch_size": _BATCH_SIZE.value}
    config = _CONFIG.value.copy_and_resolve_references()
    if _STOCK.value and (config.attention.name != "softmax" or _PLATFORM.value != "tpu"):
        raise UserError("--stock needs the attention softmax and --platform=tpu")
    config.update_from_flattened_dict(changes)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    changes = {**config_flags.get_override_values(flags.FLAGS["config"]), **changes}
    return config, Case(name, *_mesh_shape(num_devices), changes, _STOCK.value)


if __name__ == "__main__":
    cli.run(main)
