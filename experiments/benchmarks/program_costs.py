"""Computes what a compiled program costs, from its text: cycles and bytes, by purpose."""

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from experiments.benchmarks.hlo import Instruction, Program, elements, num_bytes, sizes
from experiments.records import Row


class Peaks(NamedTuple):
    """What a device can do at most in a cycle, by its maker's data sheet.

    Attributes:
      hertz: cycles per second.
      operations: operations of matrix products; a multiplication and an addition count as two.
      exponentials: transcendental functions of a number.
      bytes: bytes from and to main memory.
    """

    hertz: float
    operations: float
    exponentials: float
    bytes: float


class GpuKernel(NamedTuple):
    """The work of one of our GPU kernels, whose cost estimate JAX's Triton back end drops.

    Attributes:
      query: index of the operand with the queries, [..., length, heads, head_dim].
      key: index of the operand with the keys.
      value: index of the operand with the values.
      products: number of sums over head_dim, and over value_dim, for each pair of query and key.
    """

    query: int
    key: int
    value: int
    products: tuple[int, int]


# By kernel name. Each kernel computes one exponential per pair.
GPU_KERNELS = {
    "gaussian": GpuKernel(2, 3, 4, (1, 1)),
    "gaussian_dq": GpuKernel(2, 4, 5, (2, 1)),
    "gaussian_dkv": GpuKernel(4, 2, 3, (2, 2)),
    "softmax": GpuKernel(3, 4, 5, (1, 1)),
    "softmax_dq": GpuKernel(3, 7, 8, (2, 1)),
    "softmax_dkv": GpuKernel(6, 3, 4, (2, 2)),
}

# By device_kind. Operations are those of one bfloat16 pass. TF32 counts as two passes; float32 at
# the highest precision takes six, which a kernel's own estimate must include. A TPU core computes
# 1,024 numbers at a time.
PEAKS = {
    "TPU v5 lite": Peaks(1.5e9, 197e12 / 1.5e9, 1024, 819e9 / 1.5e9),
    "NVIDIA H100 80GB HBM3": Peaks(1.98e9, 989e12 / 1.98e9, 132 * 16, 3352e9 / 1.98e9),
}

# Opcodes that move no data.
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{([^}]*)\}')
_ESTIMATED = re.compile(r'"(\w+)":"?(\d+)"?')
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
_SHIFTS = 16  # Threefry has 20; no other computation here has nearly as many
_PROJECTIONS = re.compile(r"/(query|key|value|out|mlp_in|mlp_out|head_hidden|head_out)/")


def is_kernel(one: Instruction) -> bool:
    """Returns whether an instruction is a custom kernel, which is opaque to the compiler."""
    target = _TARGET.search(one.text) if one.opcode == "custom-call" else None
    return target is not None and target[1] in _KERNELS


def purpose(program: Program, one: Instruction) -> str:
    """Returns the purpose of an instruction, by its content and the JAX operation it comes from.

    A fusion has one purpose, the first that fits; what usually costs most is tried first.
    """
    inside = program.fused(one) if one.opcode == "fusion" else (one,)
    opcodes = collections.Counter(inner.opcode for inner in inside)
    path = one.op_name
    in_attention = "attention_layer" in path and not _PROJECTIONS.search(path)
    product = opcodes["dot"] + opcodes["convolution"] > 0
    targets = " ".join(_TARGET.findall(one.text))
    if is_kernel(one):
        return "kernels"
    if opcodes["shift-right-logical"] >= _SHIFTS:
        return "random bits" + (", with a product" if product else "")
    if product or "matmul" in targets or "gemm" in targets:
        return "products of attention" if in_attention else "other products"
    if in_attention and opcodes["exponential"]:
        return "exponentials and scores"
    if opcodes["sort"] or opcodes["top-k"] or "TopK" in targets or "top_k" in path:
        return "sorts"
    if opcodes["gather"] or opcodes["scatter"] or "gather" in path or "scatter" in path:
        return "gathers and scatters"
    if "norm/" in path:
        return "norms"
    if "Classifier" not in path and path:
        return "optimizer and the rest of the step"
    return "attention, the rest" if in_attention else "the model, the rest"


def traffic(program: Program, one: Instruction, types: Mapping[str, str]) -> int:
    """Returns the bytes that an instruction reads from main memory and writes to it.

    Of arrays that it only slices or updates in place, only the touched part counts.

    Args:
      program: the program of the instruction.
      one: an instruction that runs by itself.
      types: types of all instructions by name.
    """
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0
    if one.opcode in ("copy-start", "slice-start"):  # (destination, source, ...)
        target, source = (num_bytes(part, in_memory=True) for part in elements(one.type)[:2])
        return target + min(source, num_bytes(elements(one.type)[0]))
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * num_bytes(one.type, in_memory=True)
    if one.opcode == "dynamic-update-slice":
        return 2 * num_bytes(types.get(one.operands[1], ""), in_memory=True)
    if one.opcode == "fusion":
        return _fusion_traffic(program, one, types)
    read = sum(num_bytes(types.get(name, ""), in_memory=True) for name in one.operands)
    return read + num_bytes(one.type, in_memory=True)


def _fusion_traffic(program: Program, one: Instruction, types: Mapping[str, str]) -> int:
    body = program.computations.get(one.called[0], ()) if one.called else ()
    users = collections.defaultdict(list)
    parameters = {}
    for inner in body:
        if inner.opcode == "parameter":
            number = re.search(r"parameter\((\d+)\)", inner.text)
            parameters[int(number[1]) if number else -1] = inner.name
        for name in inner.operands:
            users[name].append(inner)

    def touched(name: str, whole: int) -> int:
        found = 0
        for user in users[name]:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                found += num_bytes(user.type)
            elif user.opcode == "bitcast":
                found += touched(user.name, whole)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(found, whole)

    read = 0
    for number, name in enumerate(one.operands):
        whole = num_bytes(types.get(name, ""), in_memory=True)
        read += touched(parameters[number], whole) if number in parameters else whole
    by_name = {inner.name: inner for inner in body}

    def written(name: str, result: str) -> int:
        inner = by_name.get(name)
        if inner is not None and inner.opcode == "bitcast":
            return written(inner.operands[0], result)
        if inner is not None and inner.opcode == "dynamic-update-slice":
            return num_bytes(types.get(inner.operands[1], ""))
        return num_bytes(result, in_memory=True)

    roots = [inner for inner in body if inner.text.lstrip().startswith("ROOT ")]
    names = [root.name for root in roots]
    if roots and roots[0].opcode == "tuple":
        names = list(roots[0].operands)
    results = elements(one.type)
    if len(names) != len(results):
        return read + num_bytes(one.type, in_memory=True)
    return read + sum(written(*pair) for pair in zip(names, results, strict=True))


def kernel_name(one: Instruction) -> str:
    """Returns the name that a kernel was given."""
    path = one.op_name.removesuffix("/pallas_call")
    return re.sub(r"[.\d]+$", "", path.split("/")[-1] or one.name)


def kernel_work(program: Program, one: Instruction, types: Mapping[str, str]) -> dict[str, int]:
    """Returns operations, exponentials and bytes of a kernel; empty if they are unknown.

    They come from the kernel's own estimate, which is in the text of TPU programs, or from
    GPU_KERNELS and its operands, with float32 multiplied in one pass of TF32.

    Args:
      program: the program of the kernel.
      one: the kernel's instruction.
      types: types of all instructions by name.
    """
    if found := _ESTIMATE.search(one.text):
        work = {name: int(number) for name, number in _ESTIMATED.findall(found[1])}
        names = {"operations": "flops", "exponentials": "transcendentals"}
        names["bytes"] = "bytes_accessed"
        return {name: work.get(theirs, 0) for name, theirs in names.items()}
    kernel = GPU_KERNELS.get(kernel_name(one))
    if kernel is None or "triton" not in one.text:
        return {}
    operands = [types.get(one.operands[i], "") for i in kernel[:3]]
    query, key, value = (list(map(int, sizes(x).split(","))) for x in operands)
    pairs = math.prod(key[:-1]) * query[-3]
    passes = 1 if all(x.startswith("bf16") for x in operands) else 2
    sums = kernel.products[0] * key[-1] + kernel.products[1] * value[-1]
    return {
        "operations": 2 * sums * pairs * passes,
        "exponentials": pairs,
        "bytes": traffic(program, one, types),
    }


def costs(program: Program, peaks: Peaks | None, scheduled: Mapping[str, int] | None = None) -> Row:
    """Computes what a program does in one execution.

    Args:
      program: the program of a compiled text.
      peaks: the device's peaks, or None if they are unknown.
      scheduled: cycles by the name of a kernel's instruction, from tpu_schedule.

    Returns:
      runs, the number of instructions that run by themselves; loops, the number of iterations of
      each; bytes_through_memory; estimated_cycles, XLA's, which only TPU programs have; kernels,
      with for each name runs, modelled_cycles (kernel_work over the peaks, for the part that takes
      longest), estimated (whether kernel_work is known) and, if known, scheduled_cycles; and
      by_purpose, with runs, bytes and cycles (of kernels, those scheduled or else modelled), sorted
      by falling cycles, then bytes.
    """
    types = {one.name: one.type for body in program.computations.values() for one in body}
    total: collections.Counter = collections.Counter()
    by: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    kernels: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for one, times, known in program.executed():
        if one.opcode in _FREE:
            continue
        moved = times * traffic(program, one, types)
        found = _CYCLES.search(one.text)
        cycles = times * int(found[1]) if found else 0
        work = {"runs": times, "bytes": moved, "cycles": cycles}
        total.update({**work, "in_unknown_loops": 0 if known else 1})
        if is_kernel(one):
            name, known_work = kernel_name(one), kernel_work(program, one, types)
            # Of the part that takes longest.
            longest = (
                max(
                    (number / getattr(peaks, part) for part, number in known_work.items()),
                    default=0,
                )
                if peaks
                else 0
            )
            modelled = times * math.ceil(longest)
            kernels[name].update({"runs": times, "modelled_cycles": modelled})
            kernels[name]["estimated"] = int(bool(known_work))
            work["cycles"] = modelled
            if scheduled and one.name in scheduled:
                work["cycles"] = times * scheduled[one.name]
                kernels[name].update({"scheduled_cycles": work["cycles"]})
        by[purpose(program, one)].update(work)
    loops = [
        program.trips(one)
        for body in program.computations.values()
        for one in body
        if one.opcode == "while"
    ]
    order = sorted(by, key=lambda name: (-by[name]["cycles"], -by[name]["bytes"]))
    return {
        "runs": total["runs"],
        "loops": loops,
        "bytes_through_memory": total["bytes"],
        "estimated_cycles": total["cycles"],
        "kernels": {name: dict(kernels[name]) for name in sorted(kernels)},
        "by_purpose": {name: dict(by[name]) for name in order},
    }
