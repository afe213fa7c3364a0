"""Counts what a compiled program sends between devices, from its text."""

import collections

from experiments.benchmarks.hlo import Instruction, Program, elements, num_bytes, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# These return a tuple of the operand, the result, and what the matching "-done" needs.
_WITH_OPERAND = ("all-gather-start", "collective-permute-start")


def kind_of(one: Instruction) -> str | None:
    """Returns the kind of collective that an instruction starts, one of KINDS, or None."""
    kind = one.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _bytes(one: Instruction) -> int:
    """Returns the bytes of a collective's results."""
    result = one.type
    if one.opcode in _WITH_OPERAND:
        result = elements(result)[1]
    return num_bytes(result)


def _begun(program: Program, one: Instruction) -> list[Instruction]:
    """Returns the collectives that an instruction starts.

    XLA for TPUs spreads a collective over several consecutive fusions. Each of them contains the
    collective, and the first one is marked.
    """
    if one.opcode != "fusion":
        return [one] if kind_of(one) else []
    fused = program.fused(one)
    if any('custom_call_target="AsyncCollectiveStart"' in inner.text for inner in fused):
        return [inner for inner in fused if kind_of(inner)]
    return []


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts a program's collectives on one device; in a loop, once per iteration.

    Args:
      text: the text of the compiled program, from jax.stages.Compiled.as_text().

    Returns:
      For each kind that occurs, the count in one execution and the bytes of the results. With B
      bytes and S devices, each device sends about 2 B (S - 1) / S bytes in an all-reduce,
      B (S - 1) / S in an all-gather, and B in a collective-permute.

    Raises:
      ValueError: if a collective is in a loop whose number of iterations is unknown.
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
