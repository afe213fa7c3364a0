"""The cycles that XLA's compiler for TPUs schedules for a kernel, which it prints on request.

A TPU executes a program's bundles of instructions in order, one a cycle, unless it waits for
memory. The compiler writes the bundles of every kernel into a folder; a kernel's cycles are those
of its loop over the grid, as often as it turns, and of what is around it. They count every branch,
and no waiting. They are of one kind for our kernels and for others'.
"""

import collections
import os
import re
from collections.abc import Iterable
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*(?:LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)\{(.*)")
_TURNS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


def write_schedules_to(folder: Path) -> None:
    """Has libtpu, which must not have been loaded, write what it schedules into a folder."""
    flags = {
        "xla_jf_dump_to": str(folder),
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "^final_bundles$",
    }
    asked = " ".join(f"--{name}={value}" for name, value in flags.items())
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {asked}".strip()


def scheduled_cycles(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Cycles by kernel, for those whose schedule is in the folder, which is empty afterwards.

    Args:
      folder: as in write_schedules_to.
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
    """Bundles of each depth of loops, times the turns of the loops around them."""
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
