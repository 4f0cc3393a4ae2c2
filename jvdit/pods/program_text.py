"""Parses the text of a compiled program, which XLA has scheduled."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2}
_BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
_BYTES |= {"f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_BEGIN = re.compile(r"\s+(ROOT )?%?([\w.\-<>]+) = ")
# Attributes may span several lines, and some of those also begin with a brace.
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and dimensions of each array in a shape, which may be a tuple."""
    return [
        (kind, tuple(int(n) for n in sizes.split(",") if n))
        for kind, sizes in _ARRAY.findall(shape)
    ]


def byte_sizes(shape: str) -> list[float]:
    """The bytes of each array in a shape, which may be a tuple."""
    return [float(_BYTES[kind]) * math.prod(sizes) for kind, sizes in arrays(shape)]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: its name, unique in the program.
        shape: shape of the result.
        op: operation, such as "fusion".
        text: the rest of the line: operands and attributes.
    """

    name: str
    shape: str
    op: str
    text: str

    @cached_property
    def cycles(self) -> int | None:
        """The cycles that the compiler expects it to take, or None."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None

    @cached_property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are its operands."""
        end = _outside(self.text, "(", ")", ")")
        return re.findall(r"%([\w.\-<>]+)", self.text[:end])

    @property
    def source(self) -> str:
        """The path in the model that it was traced from, such as "DiT/blocks/…"."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def attribute(self, *names: str) -> str:
        """The computation that an attribute such as `body` names, or ""."""
        found = re.search(rf"\b(?:{'|'.join(names)})=%?([\w.\-<>]+)", self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled and scheduled program.

    Attributes:
        computations: instructions of each computation, in the order of execution.
        entry: name of the computation that the program starts with.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int:
        """The trip count of a while loop; 1 if the program doesn't tell."""
        known = re.search(r'known_trip_count[^}]*"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), ())
        bounds = [
            int(n)
            for each in condition
            if each.op == "constant"
            for n in re.findall(r"^\((\d+)\)", each.text)
        ]
        return max(bounds, default=1)

    def branches(self, conditional: Instruction) -> list[str]:
        """Names of the computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.text)
        if listed:
            return re.findall(r"%([\w.\-<>]+)", listed[1])
        names = ("true_computation", "false_computation")
        found = [conditional.attribute(name) for name in names]
        return [name for name in found if name]

    def inside(self, fusion: Instruction) -> list[Instruction]:
        """The instructions of a fusion, and of the computations that it calls."""
        found: list[Instruction] = []
        for each in self.computations.get(fusion.attribute("calls", "to_apply"), ()):
            found.append(each)
            if each.op in ("fusion", "call", "async-start"):
                found += self.inside(each)
        return found


def read(text: str) -> Program:
    """Parses a compiled program's text, from `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current, line = "", None, ""

    def finish() -> None:
        if line and current is not None:
            made = _instruction(line)
            if made:
                computations[current].append(made)

    for raw in text.split("\n"):
        header = _COMPUTATION.match(raw)
        if header:
            finish()
            line, current = "", header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif _END.match(raw):
            finish()
            line, current = "", None
        elif _BEGIN.match(raw):
            finish()
            line = raw
        elif line:
            line += raw
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    begin = _BEGIN.match(line)
    assert begin is not None
    rest = line[begin.end() :]
    end = _outside(rest, "({", ")}", " ")
    shape, rest = rest[:end], rest[end:]
    op = re.match(r"\s*([\w\-]+)(?=\()", rest)
    if not op:
        return None
    return Instruction(begin[2], shape, op[1], rest[op.end() :])


def _outside(text: str, opening: str, closing: str, wanted: str) -> int:
    """The place of the first wanted letter that is in no bracket, or the length."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in opening) - (letter in closing)
        if letter == wanted and not depth:
            return i
    return len(text)


def group(text: str, devices: int) -> np.ndarray:
    """The ids of the devices in the first group of a collective.

    Args:
        text: the collective's attributes.
        devices: how many devices there are; all form one group by default.
    """
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)
    if pairs:
        ends = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        moved = [pair for pair in ends if pair[0] != pair[1]]
        return np.array((moved or ends)[0], int)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return np.array([int(n) for n in listed[1].split(",")])
    strided = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if strided:
        sizes = [int(n) for n in strided[3].split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if strided[4]:
            ids = ids.transpose([int(n) for n in strided[4].split(",")])
        return ids.reshape(int(strided[1]), int(strided[2]))[0]
    return np.arange(devices)
