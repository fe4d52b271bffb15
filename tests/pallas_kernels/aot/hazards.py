"""Accesses to registers that a matrix product still uses, in the machine code of Hopper kernels.

``wgmma`` reads its register operand and adds to its sums while the program goes on; until a wait
that covers it, nobody else may write the former or touch the latter. Neither ptxas nor an
interpreter sees a kernel that does.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of a kernel; ``conditional`` if it runs under a predicate."""

    address: int
    opcode: str
    operands: str
    conditional: bool


def hazards(code: list[Instruction], labels: dict[str, int]) -> list[str]:
    """Every access too early, on any path through the program, in words.

    Args:
      code: A kernel's instructions, in order.
      labels: Addresses of the targets of branches.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    found: dict[str, None] = {}
    for group in _groups(code):
        # Where the program is, how many groups it has issued since, and whether this one is whole.
        paths = [(group[0], 0, False)]
        seen = set()
        while paths:
            state = paths.pop()
            if state in seen or state[0] >= len(code):
                continue
            seen.add(state)
            i, later, whole = state
            one = code[i]
            if one.opcode.startswith("HGMMA"):
                if i == group[-1]:
                    whole = True
                elif whole and i not in group and _ends_group(one):
                    later += 1
            elif one.opcode.startswith("WARPGROUP.DEPBAR"):
                if whole and later >= int(one.operands.split(",")[1], 16):
                    continue
            else:
                issued = group if whole else [j for j in group if j <= i]
                operand = set().union(*(_operand(code[j]) for j in issued))
                sums = set().union(*(_written(code[j]) for j in issued))
                written = _written(one)
                if written & operand or (written | _read(one)) & sums:
                    found[f"{one.address:#x} {one.opcode} {one.operands.strip()}"] = None
            target = re.search(r"\((\.L_x?_?\w+)\)", one.operands)
            if target and one.opcode.startswith("BRA"):
                paths.append((at[labels[target.group(1)]], later, whole))
            if one.opcode not in ("BRA", "EXIT") or one.conditional:
                paths.append((i + 1, later, whole))
    return list(found)


def _groups(code: list[Instruction]) -> list[list[int]]:
    """Places of the products that are waited for together."""
    groups: list[list[int]] = [[]]
    for i, one in enumerate(code):
        if one.opcode.startswith("HGMMA"):
            groups[-1].append(i)
            if _ends_group(one):
                groups.append([])
    assert groups[0], "there are no products in it"
    assert not groups[-1], "the last product is in no group"
    return groups[:-1]


def _ends_group(product: Instruction) -> bool:
    return "gsb0" in product.operands


def _operand(product: Instruction) -> set[int]:
    """Registers of the weights of a product; none where they are in shared memory."""
    found = re.match(r"\s*R\d+,\s*R(\d+)", product.operands)
    return set(range(int(found[1]), int(found[1]) + 4)) if found else set()


def _written(one: Instruction) -> set[int]:
    """Registers that an instruction writes: those that its first operand names."""
    found = re.match(r"\s*(?:U?PT?\d*,\s*)?R(\d+)\b", one.operands)
    if found is None or one.opcode.startswith(("ST", "SYNCS", "BAR", "RED")):
        return set()
    return set(range(int(found[1]), int(found[1]) + _width(one)))


def _read(one: Instruction) -> set[int]:
    """Registers that an instruction names; all that a wide store takes."""
    width = _width(one) if one.opcode.startswith("ST") else 1
    return {int(r) + i for r in re.findall(r"\bR(\d+)\b", one.operands) for i in range(width)}


def _width(one: Instruction) -> int:
    product = re.match(r"HGMMA\.64x(\d+)x16\.F32", one.opcode)
    if product:
        return int(product[1]) // 2  # sums of a thread
    if ".128" in one.opcode:
        return 4
    return 2 if ".64" in one.opcode or ".WIDE" in one.opcode or one.opcode == "CS2R" else 1
