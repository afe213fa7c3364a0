"""What a compiled program sends between devices, read off its text."""

import collections
import re

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_WIDTHS = {"pred": 1, "bf16": 2}  # in bytes; of other types the name ends with the bits
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def _bytes(shapes: str) -> int:
    """Bytes of all arrays in a result's type, as f32[2,3]{1,0} or a tuple of such."""
    found = 0
    for name, sizes in _SHAPE.findall(shapes):
        width = _WIDTHS.get(name) or int(re.sub(r"\D", "", name)) // 8
        found += width * int(np.prod([int(size) for size in sizes.split(",") if size]))
    return found


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
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)

    def count(name: str) -> collections.Counter:
        found: collections.Counter = collections.Counter()
        for line in computations[name]:
            if collective := _COLLECTIVE.search(line):
                found[collective[2], "count"] += 1
                found[collective[2], "bytes"] += _bytes(collective[1])
                continue
            for called in _CALLED.findall(line):
                inner = count(called)
                trips = _TRIPS.search(line)
                if inner and " while(" in line and not trips:
                    raise ValueError(f"unknown number of turns: {line.strip()[:200]}")
                for key, number in inner.items():
                    found[key] += number * (int(trips[1]) if trips else 1)
        return found

    total = count(entry)
    return {
        kind: {what: total[kind, what] for what in ("count", "bytes")}
        for kind in KINDS
        if (kind, "count") in total
    }
