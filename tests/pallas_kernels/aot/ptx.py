"""PTX programs: which instructions a register's value comes from."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``."""

    predicate: str | None
    opcode: str
    operands: str

    def written(self) -> list[str]:
        """Registers that it sets."""
        if self.opcode.startswith(("st.", "bra", "ret", "bar")):
            return []
        return re.findall(r"%[a-z]+\d+", self._split()[0])

    def read(self) -> list[str]:
        """Registers that it reads, the predicate aside."""
        return re.findall(r"%[a-z]+\d+", self._split()[1])

    def _split(self) -> tuple[str, str]:
        first = re.match(r"\s*(\{[^}]*\}|[^,]*)", self.operands)
        assert first is not None
        return first.group(), self.operands[first.end() :]


class Program:
    """The kernel of a PTX file."""

    def __init__(self, text: str, entry: str):
        pattern = re.compile(r"\s*(?:@!?(%p\d+)\s+)?([a-z][\w.:]*)\s+(.*)", re.DOTALL)
        body = re.sub(r"//.*|\$\w+:", "", text[text.index(f".entry {entry}(") :])
        found = filter(None, map(pattern.match, body.split(";")))
        self.instructions = [Instruction(*match.groups()) for match in found]
        self._writers: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for register in instruction.written():
                self._writers.setdefault(register, []).append(instruction)

    def origins(self, registers: list[str]) -> list[Instruction]:
        """All instructions that the values of registers come from, on any path."""
        todo, seen, found = list(registers), set(registers), []
        while todo:
            for instruction in self._writers.get(todo.pop(), ()):
                found.append(instruction)
                new = set(instruction.read()) - seen
                seen |= new
                todo += new
        return found

    def loads_of(self, parameter: str) -> list[Instruction]:
        """Loads from the array that a parameter of the kernel points to."""
        loads = [i for i in self.instructions if i.opcode.startswith("ld.global")]
        return [i for i in loads if self.come_from(i.read(), parameter)]

    def come_from(self, registers: list[str], parameter: str) -> bool:
        """Whether values are made of a parameter, or of what it points to."""
        return any(f"[{parameter}]" in i.operands for i in self.origins(registers))
