"""How the TPU kernel wants codes and tables: so that unpacking is shifts and masks of whole vregs.

A word row of the kernel is ``int32``; eight of them are one vector register, or 32 rows of bytes.
A *plane* of ``b`` bits (b divides 8) holds K in units of ``32 · 8 / b`` codes: field ``i`` of byte
row ``q`` is code ``32 i + order(q)`` of its unit, so that one shift and one mask give 32
consecutive codes of 128 columns. 3-bit codes are a plane of two bits and a plane of one.

``order`` is the identity for byte lookups. For 32-bit lookups (byte row ``q = 4 r + j``) it is
``16 (j // 2) + 2 r + j % 2``: the lookups of bytes 2j and 2j + 1 are the even and the odd rows of
a packed bf16 register. For float32 weights it is ``8 j + r``.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import BLOCK, block_code

Lookup = Literal["byte", "pair", "mixed", "wide", "lane", "int8", "int32"]
"""``byte``: 8-bit sublane gathers (v6e, tpu7x). ``pair``: 32-bit sublane gathers of two bf16
entries, of which the highest bit of the code takes one by a shift. ``mixed``: the same, but an
eighth are lane gathers, which run in another unit. ``wide``: 32-bit sublane gathers to float32.
``lane``: 32-bit lane gathers to float32. ``int8`` and ``int32``: none, because the entries are
equally spaced; codes in the highest bits of bytes are converted to bf16 (v6e, tpu7x), or of words
to float32."""

COMPUTED = ("int8", "int32")
"""Of tables of equally spaced entries; codes are stored less half of their number, as signed."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of the planes that a code is split into, low bits first."""

ROWS = 32  # codes of a column that one mask yields
_ROWS_A_STEP = 256  # codes along K that are packed together


def unit(bits: int) -> int:
    """Codes along K after which the layout repeats."""
    return ROWS * 8 // min(PLANES[bits])


def byte_order(lookup: Lookup) -> np.ndarray:
    """``order[q]``: the code, within 32, that byte row ``q`` holds."""
    q = np.arange(ROWS)
    r, j = q // 4, q % 4
    if lookup in ("byte", "int8"):
        return q
    if lookup in ("pair", "mixed"):
        return 16 * (j // 2) + 2 * r + j % 2
    return 8 * j + r


def pack_planes(words: jax.Array, rows: int, columns: int, lookup: Lookup) -> tuple[jax.Array, ...]:
    """Canonical words to the kernel's planes.

    Args:
      words: ``uint8[blocks, bits, N]``.
      rows: Codes along K to pad to, a multiple of ``unit(bits)``.
      columns: N to pad to.
      lookup: The lookup of the kernel, which decides the order of rows.

    Returns:
      One ``int32[rows * b / 32, columns]`` for each plane of ``b`` bits.
    """
    blocks, bits, n = words.shape
    words = jnp.pad(words, ((0, rows // BLOCK - blocks), (0, 0), (0, columns - n)))
    # A loop, because XLA compiles the relayout of bytes in time proportional to its rows.
    step = math.gcd(rows, max(unit(bits), _ROWS_A_STEP))
    steps = words.reshape(rows // step, step // BLOCK, bits, columns)
    planes = jax.lax.map(functools.partial(_pack_step, lookup=lookup), steps)
    return _flip_signs(tuple(plane.reshape(-1, columns) for plane in planes), bits, lookup)


def _flip_signs(planes: tuple[jax.Array, ...], bits: int, lookup: Lookup) -> tuple[jax.Array, ...]:
    """Flips the highest bit of every code where codes are stored as signed numbers."""
    if lookup not in COMPUTED:
        return planes
    byte = {1: 0xFF, 2: 0xAA, 4: 0x88, 8: 0x80}[PLANES[bits][-1]]
    return (*planes[:-1], planes[-1] ^ np.uint32(0x01010101 * byte).astype(np.int32))


def _pack_step(words: jax.Array, lookup: Lookup) -> tuple[jax.Array, ...]:
    """The planes of whole units, ``[units * unit / 8, bits, N]``."""
    _, bits, n = words.shape
    order = byte_order(lookup)
    codes = [block_code(words, i).astype(jnp.int32) for i in range(BLOCK)]
    planes, low = [], 0
    for b in PLANES[bits]:
        fields = 8 // b
        shape = (-1, fields * ROWS // BLOCK, n)  # [units of this plane, blocks of a unit, N]
        parts = [((code >> low) & (2**b - 1)).reshape(shape) for code in codes]
        rows = []
        for r in range(8):
            word = jnp.zeros_like(parts[0][:, 0])
            for i, j in itertools.product(range(fields), range(4)):
                block, code = divmod(ROWS * i + int(order[4 * r + j]), BLOCK)
                word |= parts[code][:, block] << (8 * j + b * i)
            rows.append(word)
        planes.append(jnp.stack(rows, axis=1).reshape(-1, n))
        low += b
    return tuple(planes)


def unpack_planes(planes: tuple[jax.Array, ...], bits: int, lookup: Lookup) -> jax.Array:
    """The codes of :func:`pack_planes`, or of some columns of it: ``uint8[rows, columns]``."""
    place = np.argsort(byte_order(lookup))  # the byte row of each of 32 codes
    codes, low = jnp.uint8(0), 0
    for plane, b in zip(_flip_signs(planes, bits, lookup), PLANES[bits], strict=True):
        n = plane.shape[1]
        shifts = 8 * jnp.arange(4, dtype=jnp.int32).reshape(1, 1, 4, 1)
        rows = jax.lax.shift_right_logical(plane.reshape(-1, 8, 1, n), shifts) & 255
        rows = rows.astype(jnp.uint8).reshape(-1, 1, ROWS, n)[:, :, place]
        fields = rows >> jnp.arange(0, 8, b, dtype=jnp.uint8).reshape(1, -1, 1, 1)
        codes = codes | (fields & jnp.uint8(2**b - 1)).reshape(-1, n) << jnp.uint8(low)
        low += b
    return codes


def tables(lut: jax.Array, columns: int, lookup: Lookup) -> jax.Array:
    """The tables in the form of the lookup, with one column a lane.

    Args:
      lut: ``float[T, 2**bits, p]``.
      columns: N to pad to, if there is a table for each column.
      lookup: The lookup of the kernel.

    Returns:
      ``[p, rows, 128]`` for one table, ``[p, rows, columns]`` for many. ``byte``: int8, rows 0..15
      the low bytes of the bf16 entries, 16..31 the high ones. ``pair``: int32, eight rows of the
      lower half of the bf16 entries in the low 16 bits and, from 3 bits on, the upper half in the
      high ones; for ``mixed`` then eight rows with entry i in lane i. ``wide``: float32, 16 rows.
      ``lane``: float32, entry ``128 i + lane`` in row ``8 i``. Fewer entries than places repeat, so
      that bits above a code may stay. Zeros where nothing is looked up.
    """
    if lookup in COMPUTED:
        return jnp.zeros((1, 8, 128), jnp.float32)
    shared = lut.shape[0] == 1
    values = jnp.transpose(lut, (2, 1, 0)).astype(jnp.float32)  # [p, entries, T]
    p, entries, _ = values.shape
    if lookup == "lane":
        values = jnp.tile(values[..., 0], (1, -(-128 // entries))).reshape(p, -1, 1, 128)
        return jnp.broadcast_to(values, (*values.shape[:2], 8, 128)).reshape(p, -1, 128)
    if shared:
        values = jnp.broadcast_to(values, (p, entries, 128))
    else:
        values = jnp.pad(values, ((0, 0), (0, 0), (0, columns - values.shape[2])))
    if lookup == "wide":
        return jnp.tile(values, (1, 16 // entries, 1))
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if lookup in ("pair", "mixed"):
        half = max(4, entries // 2)
        rows = bits[:, :half].astype(jnp.uint32)
        if entries > half:
            rows |= bits[:, half:].astype(jnp.uint32) << np.uint32(16)
        rows = jnp.tile(rows, (1, 8 // half, 1))
        if lookup == "mixed":
            lanes = jnp.tile(bits[:, :, :8].swapaxes(1, 2), (1, 1, 128 // entries))
            rows = jnp.concatenate([rows, lanes.astype(jnp.uint32)], axis=1)
        return jax.lax.bitcast_convert_type(rows, jnp.int32)
    low, high = bits & np.uint16(255), bits >> np.uint16(8)
    padding = ((0, 0), (0, 16 - entries), (0, 0))
    both = jnp.concatenate([jnp.pad(low, padding), jnp.pad(high, padding)], axis=1)
    return jax.lax.bitcast_convert_type(both.astype(jnp.uint8), jnp.int8)
