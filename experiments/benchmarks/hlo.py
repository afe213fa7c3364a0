"""Parses the text of a compiled program: its instructions, and how often each of them runs."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([\w\-]+)\((.*)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_WIDTHS = {"pred": 1}  # in bytes; the names of other types contain their bits

# Opcodes, beside loops, that run the instructions of another computation as they are.
_CALLS = ("call", "conditional", "async-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction, which is a line of the text.

    Attributes:
      name: the name of its result.
      type: the type of its result, with the layout; a tuple type is in parentheses.
      opcode: the operation, such as "fusion".
      operands: names of its arguments.
      text: the whole line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it comes from, or ""."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs or applies."""
        found = []
        for one, branches in _CALLED.findall(self.text):
            found += [one] if one else [name.strip().lstrip("%") for name in branches.split(",")]
        return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The computations of a program by name, and the name of its entry computation."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @functools.cache  # noqa: B019 (a program lives as long as its text)
    def fused(self, fusion: Instruction) -> tuple[Instruction, ...]:
        """Returns the instructions of a fusion, including those of nested fusions."""
        found: list[Instruction] = []
        for name in fusion.called:
            for one in self.computations.get(name, ()):
                found += [one, *(self.fused(one) if one.opcode == "fusion" else ())]
        return tuple(found)

    def trips(self, loop: Instruction) -> int | None:
        """Returns the number of iterations of a loop, or None if the text does not tell.

        The text of a TPU program has no number. There, the condition compares a counter, which
        starts at 0 and grows by 1, to the only integer constant in it.
        """
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = _CONDITION.search(loop.text)
        constants = {
            int(number[1])
            for one in self.computations.get(condition[1] if condition else "", ())
            if one.opcode == "constant" and (number := re.search(r"constant\((\d+)\)", one.text))
        }
        return constants.pop() if len(constants) == 1 else None

    def executed(self) -> Iterator[tuple[Instruction, int, bool]]:
        """Yields every instruction that runs by itself: a fusion, but nothing within it.

        Yields:
          The instruction, how often it runs, and whether that is known: a loop with an unknown
          number of iterations counts as one. All branches of a conditional count.
        """
        yield from self._executed(self.entry, 1, True)

    def _executed(
        self, name: str, times: int, known: bool
    ) -> Iterator[tuple[Instruction, int, bool]]:
        for one in self.computations.get(name, ()):
            if one.opcode == "while":
                trips = self.trips(one)
                body = re.search(r"body=%?([\w.\-]+)", one.text)
                known_turns = known and trips is not None
                yield from self._executed(
                    body[1] if body else "", times * (trips or 1), known_turns
                )
            elif one.opcode in _CALLS:
                for called in one.called:
                    yield from self._executed(called, times, known)
            else:
                yield one, times, known


def parse(text: str) -> Program:
    """Parses the text that jax.stages.Compiled.as_text() returns."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            result, rest = _split_type(found[2])
            if opcode := _OPCODE.match(rest):
                operands = tuple(_OPERAND.findall(_until_closed(opcode[2])))
                lines.append(Instruction(found[1], result, opcode[1], operands, line))
    return Program({name: tuple(found) for name, found in computations.items()}, entry)


def _until_closed(text: str) -> str:
    """Returns the text before the first closing bracket that has no opening one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth < 0:
            return text[:i]
    return text


def _split_type(text: str) -> tuple[str, str]:
    """Splits text into the type of a result and what follows it."""
    if text.startswith("("):
        inside = _until_closed(text[1:])
        return text[: len(inside) + 2], text[len(inside) + 2 :].lstrip()
    result, _, rest = text.partition(" ")
    return result, rest


def elements(result: str) -> list[str]:
    """Returns the types in a tuple type, or the type itself if it is not a tuple."""
    if not result.startswith("("):
        return [result]
    found, depth, start = [], 0, 1
    for i, character in enumerate(result):
        depth += (character in "({[") - (character in ")}]")
        if (character == "," and depth == 1) or depth == 0:
            found.append(re.sub(r"/\*.*?\*/", "", result[start:i]).strip())
            start = i + 1
    return [one for one in found if one]


def sizes(result: str) -> str:
    """Returns the sizes in an array type, such as "2,3" for f32[2,3]{1,0}."""
    found = _ARRAY.search(result)
    return found[2] if found else ""


def num_bytes(result: str, *, in_memory: bool = False) -> int:
    """Returns the bytes of all arrays in a type.

    Args:
      result: a type such as f32[2,3]{1,0}, or a tuple of such types.
      in_memory: leaves out arrays outside the device's main memory, with S(1) or another memory
        space in their layouts.
    """
    found = 0
    for name, sizes, layout in _ARRAY.findall(result):
        bits = re.search(r"\d+", name)
        if not (bits or name in _WIDTHS) or (in_memory and "S(" in layout):
            continue
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        width = _WIDTHS.get(name) or int(bits[0]) / 8  # type: ignore[index]
        found += int(width * count)
    return found
