"""Table lookups inside a TPU kernel: 32 codes of 128 columns from packed words to weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lut_matmul.mosaic_tpu_layout import PLANES, ROWS, Lookup

LANES = 128


def gather(table: jax.Array, index: jax.Array, axis: int, interpret: bool) -> jax.Array:
    """``table[index[i, j], j]`` (axis 0) or ``table[i, index[i, j]]`` (axis 1), modulo the size.

    Mosaic defines ``tpu.dynamic_gather`` so, which saves masks; the interpreter does not.
    ``jnp.take_along_axis`` would widen narrow indices to 32 bits, which the compiler refuses.
    """
    if interpret:
        index = index & (table.shape[axis] - 1)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, index[..., None], numbers, slice_sizes=(1, 1), mode=mode)


def byte_constants() -> np.ndarray:
    """``int8[3, 32, 128]`` for byte lookups.

    Rows ``2 r`` and ``2 r + 1`` of the first two arrays both pick byte row ``r`` of the lower and
    the upper half: a byte gather with them doubles every code, once for each byte of its bf16
    entry. The third array sends the second of the two to the rows of the high bytes.
    """
    r = np.arange(ROWS)
    rows = np.stack([r // 2, 16 + r // 2, 16 * (r % 2)])
    return np.broadcast_to(rows[:, :, None], (3, ROWS, LANES)).astype(np.int8)


def _shifted(plane: jax.Array, bits: int, row: int, byte: int, to: int) -> jax.Array:
    """The field of code ``row`` in one byte of each int32 of a plane, moved to bit ``to``."""
    by = bits * (row % (ROWS * 8 // bits) // ROWS) + 8 * byte - to
    if by < 0:
        return plane << -by
    return lax.shift_right_logical(plane, jnp.full_like(plane, by)) if by else plane


def _codes(words: tuple, bits: int, row: int, byte: int | None) -> jax.Array:
    """Codes ``row .. row + 31``: all bytes of an int32 vreg, or one byte of each (``byte``).

    Bits above a code of one byte are left in place if the code is of one plane.
    """
    total, low = None, 0
    for b, plane in zip(PLANES[bits], words, strict=True):
        part = _shifted(plane, b, row, byte or 0, low)
        mask = (2**b - 1) << low
        if byte is None:
            mask *= 0x01010101
            part &= mask - (2**32 if mask >= 2**31 else 0)
        elif b < bits:
            part &= mask
        total = part if total is None else total | part
        low += b
    assert total is not None
    return total


def _highest(words: tuple, bits: int, row: int, byte: int, width: int) -> jax.Array:
    """Codes ``row .. row + 31`` in the highest bits of bytes (width 8), or of words (32).

    Below them are zeros, but in words whose codes are of one plane.
    """
    total, low = None, width - bits
    for b, plane in zip(PLANES[bits], words, strict=True):
        part = _shifted(plane, b, row, byte, low)
        mask = ((2**b - 1) << low) * (0x01010101 if width == 8 else 1)
        if b < (8 if width == 8 else bits):
            part &= mask - (2**32 if mask >= 2**31 else 0)
        total = part if total is None else total | part
        low += b
    assert total is not None
    return total


def lookup_rows(
    plane_refs: tuple,
    table: jax.Array,
    constants: tuple,
    *,
    bits: int,
    row: int,
    lanes: slice,
    lookup: Lookup,
    interpret: bool,
) -> list[jax.Array]:
    """Weights ``row .. row + 31`` of 128 columns as pieces that concatenate along rows.

    Args:
      plane_refs: The packed planes, ``int32[words, BN]``.
      table: One table of :func:`mosaic_tpu_layout.tables`, ``[rows, 128]``.
      constants: Of :func:`byte_constants` for byte lookups, else empty.
      bits: Bits a code.
      row: The first code, a multiple of 32.
      lanes: The 128 columns.
      lookup: Which lookup to use.
      interpret: Whether the kernel is interpreted, which lacks two things that Mosaic has.

    Returns:
      One ``bf16[32, 128]`` for ``int8``, two ``bf16[16, 128]``, or four ``float32[8, 128]`` for
      ``wide``, ``lane`` and ``int32``.
    """
    units = [row // (ROWS * 8 // b) for b in PLANES[bits]]
    words = tuple(ref[8 * u : 8 * u + 8, lanes] for ref, u in zip(plane_refs, units, strict=True))
    period = ROWS * 8 // min(PLANES[bits])
    return _lookup(
        words,
        table,
        constants,
        bits=bits,
        row=row % period,
        lookup=lookup,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("bits", "row", "lookup", "interpret"))
def _lookup(
    words: tuple,
    table: jax.Array,
    constants: tuple,
    *,
    bits: int,
    row: int,
    lookup: Lookup,
    interpret: bool,
) -> list[jax.Array]:
    """:func:`lookup_rows` on registers; jitted so that a large kernel is traced once a pattern."""
    if lookup == "int8":
        return [pltpu.bitcast(_highest(words, bits, row, 0, 8), jnp.int8).astype(jnp.bfloat16)]
    if lookup == "int32":
        codes = [_highest(words, bits, row, byte, 32) >> (32 - bits) for byte in range(4)]
        return [code.astype(jnp.float32) for code in codes]
    take = functools.partial(gather, interpret=interpret)
    if lookup == "byte":
        packed = pltpu.bitcast(_codes(words, bits, row, None), jnp.int8)
        *halves, plane = constants
        indices = [take(packed, half, 0) | plane for half in halves]
        return [pltpu.bitcast(take(table, index, 0), jnp.bfloat16) for index in indices]
    if lookup in ("pair", "mixed"):
        values = []
        for byte in range(4):
            if lookup == "mixed" and byte == 0 and row % (2 * ROWS) == 0:
                values.append(take(table[8:], _codes(words, bits, row, byte), 1))
                continue
            index = _shifted(words[0], PLANES[bits][0], row, byte, 0)
            pair = take(table[:8], index, 0)
            if bits > 2:  # the highest bit of the code, at bit 4: shift by 16 or not
                last = PLANES[bits][-1]
                upper = _shifted(words[-1], last, row, byte, 5 - last) & 16
                pair = lax.shift_right_logical(pair, upper)
            values.append(pair)
        return [_pack(values[j], values[j + 1], interpret) for j in (0, 2)]
    codes = [_codes(words, bits, row, byte) for byte in range(4)]
    if lookup == "wide":
        return [_sixteen(table, code, bits, take) for code in codes]
    return [_lane(table, code, bits, take) for code in codes]


def _pack(even: jax.Array, odd: jax.Array, interpret: bool) -> jax.Array:
    """The low halves of two int32 registers as the even and odd rows of a bf16 register."""
    if interpret:  # the interpreter has no rule for the instruction
        both = even & 0xFFFF | odd << 16
    else:
        both = pltpu.pack_elementwise([even, odd], packed_dtype=jnp.int16)
    return pltpu.bitcast(both, jnp.bfloat16)


def _sixteen(table: jax.Array, codes: jax.Array, bits: int, take: Callable) -> jax.Array:
    """A table of up to 16 entries by 8-row gathers, and a select for the fourth bit."""
    if bits <= 3:
        return take(table[:8], codes, 0)
    low, high = (take(table[i : i + 8], codes, 0) for i in (0, 8))
    return jnp.where((codes & 8) != 0, high, low)


def _lane(table: jax.Array, codes: jax.Array, bits: int, take: Callable) -> jax.Array:
    """A table of 128 entries a register by lane gathers, and a select for the eighth bit."""
    if bits <= 7:
        return take(table[:8], codes, 1)
    low, high = (take(table[i : i + 8], codes, 1) for i in (0, 8))
    return jnp.where((codes & 128) != 0, high, low)
