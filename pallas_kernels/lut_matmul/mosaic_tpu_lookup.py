"""Table lookups inside a TPU kernel: 32 codes of 128 columns from packed words to weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lut_matmul.mosaic_tpu_layout import PLANES, ROWS, Lookup

LANES = 128
LANE_BYTES = (0,)  # looked up by lane gathers in a mixed lookup; it balances the two units


def gather(table: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """``table[index[i, j], j]`` (axis 0) or ``table[i, index[i, j]]`` (axis 1).

    ``jnp.take_along_axis`` would widen narrow indices to 32 bits, which the compiler refuses.
    """
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


def _shift(words: jax.Array, amount: int) -> jax.Array:
    return lax.shift_right_logical(words, jnp.full_like(words, amount)) if amount else words


def _field(words: tuple, bits: int, row: int, byte: int | None, whole: bool = False) -> jax.Array:
    """Codes ``row .. row + 31``: masked bytes of an int32 vreg, or one byte of each (``byte``).

    With ``whole`` the bits above the code are left in place.
    """
    total, low = None, 0
    for b, plane in zip(PLANES[bits], words, strict=True):
        at = b * (row % (ROWS * 8 // b) // ROWS)
        mask = (2**b - 1) << low
        if byte is None:
            mask *= 0x01010101
            mask -= 2**32 if mask >= 2**31 else 0
        else:
            at += 8 * byte
        moved = _shift(plane, at - low) if at >= low else plane << (low - at)
        part = moved if whole or (b == 8 and byte == 3) else moved & mask
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

    Returns:
      Two ``bf16[16, 128]``, or four ``float32[8, 128]`` for ``wide`` and ``lane``.
    """
    units = [row // (ROWS * 8 // b) for b in PLANES[bits]]
    words = tuple(ref[8 * u : 8 * u + 8, lanes] for ref, u in zip(plane_refs, units, strict=True))
    period = ROWS * 8 // min(PLANES[bits])
    return _lookup(words, table, constants, bits=bits, row=row % period, lookup=lookup)


@functools.partial(jax.jit, static_argnames=("bits", "row", "lookup"))
def _lookup(
    words: tuple, table: jax.Array, constants: tuple, *, bits: int, row: int, lookup: Lookup
) -> list[jax.Array]:
    """:func:`lookup_rows` on registers; jitted so that a large kernel is traced once a pattern."""
    if lookup == "byte":
        packed = pltpu.bitcast(_field(words, bits, row, None), jnp.int8)
        *halves, plane = constants
        indices = [gather(packed, half, 0) | plane for half in halves]
        return [pltpu.bitcast(gather(table, index, 0), jnp.bfloat16) for index in indices]
    whole = bits == 4  # the gathers mask the bits they use themselves
    codes = [_field(words, bits, row, byte, whole) for byte in range(4)]
    if lookup in ("pair", "mixed"):
        values: list[jax.Array] = []
        for byte, code in enumerate(codes):
            if lookup == "mixed" and byte in LANE_BYTES:
                start = 32 + 8 * (byte % 2)
                values.append(gather(table[start : start + 8], code & 15, 1))
            else:
                start = 16 * (byte % 2)
                values.append(_sixteen(table[start : start + 16], code, bits))
        return [pltpu.bitcast(values[j] | values[j + 1], jnp.bfloat16) for j in (0, 2)]
    if lookup == "wide":
        return [_sixteen(table, code, bits) for code in codes]
    return [_lane(table, code & 15 if whole else code, bits) for code in codes]


def _sixteen(table: jax.Array, codes: jax.Array, bits: int) -> jax.Array:
    """A table of up to 16 entries by 8-row gathers, and a select for the fourth bit."""
    if bits <= 3:
        return gather(table[:8], codes, 0)
    low, high = (gather(table[i : i + 8], codes & 7, 0) for i in (0, 8))
    return jnp.where((codes & 8) != 0, high, low)


def _lane(table: jax.Array, codes: jax.Array, bits: int) -> jax.Array:
    """A table of 128 entries a register by lane gathers, and a select for the eighth bit."""
    if bits <= 7:
        return gather(table[:8], codes, 1)
    low, high = (gather(table[i : i + 8], codes & 127, 1) for i in (0, 8))
    return jnp.where((codes & 128) != 0, high, low)
