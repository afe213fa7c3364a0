"""Counts the cycles that XLA's TPU compiler schedules for a kernel, which it writes on request.

A TPU executes a program's bundles of instructions in order, one per cycle, unless it waits for
memory. The compiler writes the bundles of every kernel to a folder. The cycles of a kernel are the
bundles of its loop over the grid, times the iterations, and those outside the loop. Every branch
counts, and waiting does not. Our kernels and others are counted alike, so their cycles compare.
"""

import collections
import os
import re
from collections.abc import Iterable
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*(?:LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)\{(.*)")
_TURNS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


def write_schedules_to(folder: Path) -> None:
    """Makes libtpu, which must not be loaded yet, write its schedules to a folder."""
    flags = {
        "xla_jf_dump_to": str(folder),
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "^final_bundles$",
    }
    asked = " ".join(f"--{name}={value}" for name, value in flags.items())
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {asked}".strip()


def scheduled_cycles(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Returns the cycles of each kernel whose schedule is in the folder, and empties the folder.

    Args:
      folder: the folder of write_schedules_to.
      names: names of the kernels' instructions in the compiled text.
    """
    found = {}
    for name in names:
        files = sorted(folder.glob(f"*-{name}-*-final_bundles.txt"))
        if files:
            found[name] = _cycles(files[-1].read_text())
    for path in folder.iterdir():
        path.unlink()
    return found


def _cycles(text: str) -> int:
    """Sums the bundles of each loop depth, times the iterations of the loops around them."""
    bundles: collections.Counter[int] = collections.Counter()
    turns: dict[int, int] = {}
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            depth = bundle[1].count(">")
            bundles[depth] += 1
            if exit_test := _TURNS.search(bundle[2]):
                turns[depth] = int(exit_test[1])
    total, times = 0, 1
    for depth in sorted(bundles):
        times *= turns.get(depth, 1) if depth else 1
        total += times * bundles[depth]
    return total
