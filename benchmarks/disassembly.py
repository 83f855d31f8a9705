"""What a kernel's machine code does, read from its disassembly: loops, and what is in them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_HGMMA = re.compile(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
_HMMA = re.compile(r"HMMA\.(?:SP\.)?(16|8)(8|16)(4|8|16|32)\b")
WARP_GROUP = 4  # warps that an HGMMA is of


@dataclass(frozen=True, slots=True)
class Instruction:
    """Its name with all that qualifies it, and the label that it may go to."""

    name: str
    target: str | None

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]

    def flops(self, warps: int) -> float:
        """Of a matrix product, by all the warps that execute it."""
        if found := _HGMMA.match(self.name):
            rows, columns, inner = map(int, found.groups())
            return 2.0 * rows * columns * inner * warps / WARP_GROUP
        if found := _HMMA.match(self.name):
            rows, columns, inner = map(int, found.groups())
            return 2.0 * rows * columns * inner * warps
        return 0.0


@dataclass(frozen=True, slots=True)
class Loop:
    """Instructions from a label to the jump back to it, both included."""

    first: int
    last: int


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in order, and its loops, the outer ones after those within."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def within(self, loop: Loop | None) -> tuple[Instruction, ...]:
        """Those of a loop; all, of None."""
        return self.instructions if loop is None else self.instructions[loop.first : loop.last + 1]

    def main_loop(self) -> Loop | None:
        """The innermost one with most of the matrix products; where there are none, with most instructions."""
        inner = [one for one in self.loops if not any(_is_inside(other, one) for other in self.loops)]
        products = [one for one in inner if any(is_product(each) for each in self.within(one))]
        if not products and any(map(is_product, self.instructions)):
            return None  # products are outside of loops
        return max(products or inner, key=lambda one: self._weight(one, bool(products)), default=None)

    def _weight(self, loop: Loop, by_products: bool) -> float:
        instructions = self.within(loop)
        return sum(one.flops(WARP_GROUP) for one in instructions) if by_products else len(instructions)


def is_product(instruction: Instruction) -> bool:
    """Whether tensor cores do it."""
    return instruction.family in ("HGMMA", "QGMMA", "HMMA", "IMMA")


def _is_inside(one: Loop, other: Loop) -> bool:
    return one != other and other.first <= one.first and one.last <= other.last


def parse(disassembly: str) -> Code:
    """Read what nvdisasm prints. What comes after the last EXIT before a jump to itself is padding, and left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(line):
            target = _TARGET.search(found[2])
            instructions.append(Instruction(found[1], target[1] if target else None))
    loops = set()
    for i, one in enumerate(instructions):
        if one.family == "BRA" and one.target in labels and labels[one.target] < i:
            loops.add(Loop(labels[one.target], i))
    end = next(
        (i for i, one in enumerate(instructions) if one.family == "BRA" and labels.get(one.target or "") == i),
        len(instructions),
    )
    ordered = sorted(loops, key=lambda loop: loop.last - loop.first)
    return Code(tuple(instructions[:end]), tuple(loop for loop in ordered if loop.last < end))


def count_families(instructions: tuple[Instruction, ...]) -> Counter[str]:
    """How often each family of instructions is there."""
    return Counter(one.family for one in instructions)
