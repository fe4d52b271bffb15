"""Lookups of 2, 3 and 4-bit codes in registers, as inline PTX for the Triton kernel.

The table is kept as two planes of bytes, the low and the high ones of its 16-bit entries, four to a
register. A byte permute (``prmt``) looks up four codes in a plane of eight entries: its selector
is four nibbles, which is how packed codes come.
"""

from __future__ import annotations

WORDS = {2: 1, 3: 3, 4: 1}
"""Bytes of one column that are unpacked together (``WORDS[bits] * 8 // bits`` codes)."""

ORDER = {2: (0, 2, 1, 3, 4, 6, 5, 7), 3: (0, 1, 3, 4, 6, 7, 2, 5), 4: tuple(range(8))}
"""The order in which the codes of a block come out: two that fit a byte are neighbours."""


def lookup(bits: int) -> tuple[str, str]:
    """PTX and constraints that turn packed bytes of four columns into 16-bit entries.

    Operands: for every two codes (in :data:`ORDER`) four result registers, one a column, with the
    first entry in the low half; ``WORDS[bits]`` registers with a byte of each column;
    ``2**bits / 2`` registers of the table, its low plane first, each repeated four times (Triton
    passes a scalar once for every packed element).

    >>> ptx, constraints = lookup(4)
    >>> ptx.count("prmt"), constraints.count("=r")
    (16, 4)
    """
    codes = 8 * WORDS[bits] // bits
    first = 2 * codes  # two entries a register, four columns
    words = [f"${first + i}" for i in range(WORDS[bits])]
    registers = 2**bits // 2
    table = [f"${first + len(words) + 4 * i}" for i in range(registers)]
    planes = {"lo": table[: registers // 2], "hi": table[registers // 2 :]}
    body: list[str] = []
    for pair, selector in enumerate(_selectors(bits, words, body)):
        for half in range(2):  # two of the four columns
            for name, entries in planes.items():
                second = entries[1] if len(entries) > 1 else entries[0]
                body.append(f"prmt.b32 {name}, {entries[0]}, {second}, {selector}")
                if bits == 4:
                    body.append(f"prmt.b32 upper, {entries[2]}, {entries[3]}, {selector}")
                    body.append(f"prmt.b32 {name}, {name}, upper, eight")
            for column, picked in enumerate(("0x5140", "0x7362")):  # low and high bytes in turn
                body.append(f"prmt.b32 ${4 * pair + 2 * half + column}, lo, hi, {picked}")
            if half == 0:
                body.append(f"shr.u32 {selector}, {selector}, 16")
                if bits == 4:
                    body.append("shr.u32 eight, eight, 16")
    declared = ".reg .b32 s0, s1, s2, s3, part, lo, hi, upper, eight"
    constraints = ["=r"] * first + ["r"] * (len(words) + 4 * registers)
    return "{" + ";\n".join([declared, *body]) + ";}", ",".join(constraints)


def _selectors(bits: int, words: list[str], body: list[str]) -> list[str]:
    """Appends what puts two codes of :data:`ORDER` into each byte; the registers with them."""

    def take(name: str, *fields: tuple[int, int, int]) -> str:
        """Ors fields (word, right shift, mask of a byte) into one register."""
        for i, (word, shift, mask) in enumerate(fields):
            source, target = words[word], "part" if i else name
            if shift:
                op, amount = ("shr.u32", shift) if shift > 0 else ("shl.b32", -shift)
                body.append(f"{op} {target}, {source}, {amount}")
                source = target
            body.append(f"and.b32 {target}, {source}, {mask * 0x01010101:#x}")
            if i:
                body.append(f"or.b32 {name}, {name}, part")
        return name

    match bits:
        case 2:
            return [take("s0", (0, 0, 0x33)), take("s1", (0, 2, 0x33))]
        case 3:  # codes 2 and 5 of a block lie across its bytes
            return [
                take("s0", (0, 0, 0x07), (0, -1, 0x70)),
                take("s1", (1, 1, 0x07), (1, 0, 0x70)),
                take("s2", (2, 2, 0x07), (2, 1, 0x70)),
                take("s3", (0, 6, 0x03), (1, -2, 0x04), (1, 3, 0x10), (2, -5, 0x60)),
            ]
        case _:  # the fourth bit says which half of the table each byte comes from
            body.append(f"shr.u32 eight, {words[0]}, 1")
            body.append("lop3.b32 eight, eight, 0x44444444, 0x32103210, 0xEA")
            return [take("s0", (0, 0, 0x77))]
