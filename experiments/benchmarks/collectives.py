"""What a compiled program sends between devices, read off its text."""

import collections

from experiments.benchmarks.hlo import Instruction, Program, elements, num_bytes, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# These begin with a tuple of the operand, the result and what the end needs.
_WITH_OPERAND = ("all-gather-start", "collective-permute-start")


def kind_of(one: Instruction) -> str | None:
    """Which of KINDS begins with the instruction, if any."""
    kind = one.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _bytes(one: Instruction) -> int:
    """Bytes of a collective's results."""
    result = one.type
    if one.opcode in _WITH_OPERAND:
        result = elements(result)[1]
    return num_bytes(result)


def _begun(program: Program, one: Instruction) -> list[Instruction]:
    """The collectives that an instruction begins.

    XLA for TPUs spreads a collective over several fusions, one after another, of which each holds
    it: the first is marked.
    """
    if one.opcode != "fusion":
        return [one] if kind_of(one) else []
    fused = program.fused(one)
    if any('custom_call_target="AsyncCollectiveStart"' in inner.text for inner in fused):
        return [inner for inner in fused if kind_of(inner)]
    return []


def collectives(text: str) -> dict[str, dict[str, int]]:
    """A program's collectives, on one device, those in loops as often as they turn.

    Args:
      text: the compiled program's, of jax.stages.Compiled.as_text().

    Returns:
      For each kind that occurs, the count of an execution and the bytes of their results. An
      all-reduce of B bytes over S devices sends about 2 B (S - 1) / S of them from each device, an
      all-gather B (S - 1) / S, a collective-permute B.

    Raises:
      ValueError: for a collective in a loop whose number of turns is not known.
    """
    program = parse(text)
    total: collections.Counter = collections.Counter()
    for one, times, known in program.executed():
        for collective in _begun(program, one):
            if not known:
                line = collective.text.strip()[:200]
                raise ValueError(f"a collective in a loop of an unknown number of turns: {line}")
            kind = kind_of(collective)
            total[kind, "count"] += times
            total[kind, "bytes"] += times * _bytes(collective)
    return {
        kind: {what: total[kind, what] for what in ("count", "bytes")}
        for kind in KINDS
        if (kind, "count") in total
    }
