"""How the Hopper kernel wants codes and tables: every byte of a word is one lookup.

The weight is the transposed left operand of ``wgmma`` and lives in registers: a tile of 64 columns
n and 16 rows k is four registers of two bf16 a thread. Thread ``32 w + 4 g + t`` holds columns
``16 w + 8 r + g`` and rows ``8 c + 2 t + v`` in register ``2 c + r`` (c, r, v in 0, 1). A thread's
words are contiguous vectors, so that shared memory is read 16 bytes at a time.

A byte is the index of a table that is copied once for each lane, 256 bytes apart: inserting the
byte into the lane's own address is one byte permute, and no two lanes share a bank.

===== ============================================================== ===================
bits  a byte holds                                                   the table's entry
===== ============================================================== ===================
2     four codes: both registers r of one c                          two registers
3     two nibbles of a code each, joined from words of 2 and 1 bits  one register
4     two codes: one register                                        one register
8     one code                                                       half a register
===== ============================================================== ===================

Nibbles of a code of 2 or 3 bits are also the selectors of byte permutes, which look up the low and
the high bytes of four values in registers.

A code of 4, 6 or 8 bits for two rows (vector tables, p = 2) has the same bytes as two codes of half
as many bits, and every entry that holds values of both is as easily that of their pair: only the
entries differ, and there are no permutes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import unpack

TILE_N = 64
SLICE_K = 128
"""Rows that a warpgroup works on at a time: whole vectors of words at every bit width."""

_U32 = jnp.uint32


def bits_of_row(words: Any, p: int) -> int | None:
    """Bits a row of canonical words whose codes stand for ``p`` rows; None if the kernel has none.

    >>> bits_of_row(np.zeros((1, 6, 64), np.uint8), p=2)
    3
    """
    bits, rest = divmod(words.shape[1], p)
    return bits if not rest and bits in {1: (2, 3, 4, 8), 2: (2, 3, 4)}.get(p, ()) else None


def pack_fragments(words: jax.Array, rows: int, columns: int, p: int = 1) -> tuple[jax.Array, ...]:
    """Canonical words to the kernel's words.

    Args:
      words: ``uint8[blocks, bits, N]``.
      rows: K padded to a multiple of ``SLICE_K``.
      columns: N padded to a multiple of ``TILE_N``.
      p: Rows that share a code, 1 or 2.

    Returns:
      One array, or for 3 bits two (of 2 and of 1 bit), of
      ``uint32[columns / 64, rows / 128, words of a thread, 128]``. Read flat, the words of a
      thread are in vectors of ``vector_lengths(bits)``, a vector of all threads after the other.
    """
    n = words.shape[2]
    bits = words.shape[1] // p
    words = words.reshape(-1, bits, n)  # a block for two rows a code is two blocks of its halves
    codes = unpack(words)[:rows]
    codes = jnp.pad(codes, ((0, rows - codes.shape[0]), (0, columns - n)))
    codes = codes.T.reshape(columns // 64, 4, 2, 8, rows // 128, 8, 2, 4, 2)
    # axes: tile, warp, r, g, slice, step, c, t, v -> tile, slice, thread, step, c, r, v
    codes = codes.transpose(0, 4, 1, 3, 7, 5, 6, 2, 8)
    codes = codes.reshape(columns // 64, rows // 128, 128, 8, 2, 2, 2).astype(_U32)
    if bits == 4:
        return (_vectors(_join(codes, 4, (-3, -2, -1)), 4),)
    if bits == 2:  # byte 2 (step % 2) + c, crumb 2 v + r
        codes = codes.reshape(*codes.shape[:3], 4, 2, 2, 2, 2).swapaxes(-2, -1)
        return (_vectors(_join(codes, 2, (-4, -3, -2, -1)), 4),)
    if bits == 8:  # a word holds r, v of one c
        words32 = _join(codes, 8, (-2, -1))
        return (_vectors(words32.reshape(*words32.shape[:3], 16), 4),)
    low, high = codes & _U32(3), codes >> _U32(2)
    low = low.reshape(*low.shape[:3], 4, 2, 2, 2, 2)  # step // 2, step % 2, c, r, v
    low = jnp.moveaxis(low, 4, 7)  # byte 2 c + r, crumb 2 v + step % 2
    high = high.reshape(*high.shape[:3], 2, 4, 2, 2, 2)
    high = jnp.moveaxis(high, 4, 7)  # byte 2 c + r, bit 4 v + step % 4
    return (
        _vectors(_join(low, 2, (-4, -3, -2, -1)), 4),
        _vectors(_join(high, 1, (-4, -3, -2, -1)), 2),
    )


def unpack_columns(
    planes: tuple[jax.Array, ...], bits: int, columns: jax.Array, p: int = 1
) -> jax.Array:
    """The codes of some columns of :func:`pack_fragments`, ``uint8[rows / p, len(columns)]``.

    ``bits`` are those of a row.
    """
    step, c, v = np.unravel_index(np.arange(32), (8, 2, 2))
    # Of each plane its bits, the word of a thread, and the place of a code of register r there.
    found = {
        2: [(2, step // 2, 16 * (step % 2) + 8 * c + 4 * v, 2)],
        3: [
            (2, step // 2, 16 * c + 4 * v + 2 * (step % 2), 8),
            (1, step // 4, 16 * c + 4 * v + step % 4, 8),
        ],
        4: [(4, step, 16 * c + 4 * v, 8)],
        8: [(8, 2 * step + c, 8 * v, 16)],
    }[bits]
    tile, warp = columns // TILE_N, columns // 16 % 4
    r, g = columns // 8 % 2, columns % 8
    codes, low = jnp.uint8(0), 0
    for plane, length, (b, word, place, of_r) in zip(
        planes, vector_lengths(bits), found, strict=True
    ):
        tiles, slices, count, _ = plane.shape
        threads = plane.reshape(tiles, slices, count // length, 4, 8, 4, length)
        threads = threads[tile, :, :, warp, g]  # [columns, slices, vectors, t, length]
        words = threads.swapaxes(2, 3).reshape(len(columns), slices, 4, count)[..., word]
        shifts = (place[None] + of_r * r[:, None]).astype(_U32)[:, None, None]
        part = ((words >> shifts) & _U32(2**b - 1)).astype(jnp.uint8) << jnp.uint8(low)
        codes, low = codes | part, low + b
    # [columns, slices, t, (step, c, v)] to rows: slice, step, c, t, v
    codes = codes.reshape(*codes.shape[:3], 16, 2).swapaxes(2, 3).reshape(len(columns), -1, p)
    joined = sum((codes[..., i] << jnp.uint8(bits * i) for i in range(1, p)), start=codes[..., 0])
    return joined.T


def _join(codes: jax.Array, bits: int, axes: tuple[int, ...]) -> jax.Array:
    """Joins the codes of the trailing ``axes`` into words, the last axis in the lowest bits."""
    count = len(axes)
    codes = codes.reshape(*codes.shape[: codes.ndim - count], -1)
    shifts = jnp.arange(codes.shape[-1], dtype=_U32) * _U32(bits)
    return jnp.sum(codes << shifts.reshape((1,) * (codes.ndim - 1) + (-1,)), axis=-1, dtype=_U32)


def _vectors(words: jax.Array, length: int) -> jax.Array:
    """``[tile, slice, thread, words]`` to vectors of ``length`` words of all threads in turn."""
    tiles, slices, threads, count = words.shape
    words = words.reshape(tiles, slices, threads, count // length, length)
    return words.swapaxes(2, 3).reshape(tiles, slices, count, threads)


def vector_lengths(bits: int) -> tuple[int, ...]:
    """Words in a vector of each plane."""
    return (4, 2) if bits == 3 else (4,)


def words_of_step(bits: int, step: int) -> list[tuple[int, int]]:
    """Which words of a thread a step of 16 rows within a slice reads: (plane, word)."""
    if bits == 4:
        return [(0, step)]
    if bits == 2:
        return [(0, step // 2)]
    if bits == 3:
        return [(0, step // 2), (1, step // 4)]
    return [(0, 2 * step), (0, 2 * step + 1)]


def lookup_bytes(words: list[jax.Array], bits: int, step: int) -> list[jax.Array]:
    """The bytes that the words of a step hold, in order of the registers they become.

    2 bits: c = 0, 1; 3 and 4 bits: registers 0..3; 8 bits: (register, v) in order.
    """

    def byte(word: jax.Array, index: int) -> jax.Array:
        return (word >> _U32(8 * index)) & _U32(255)

    if bits == 4:
        return [byte(words[0], q) for q in range(4)]
    if bits == 2:
        return [byte(words[0], 2 * (step % 2) + c) for c in range(2)]
    if bits == 3:
        low = (words[0] >> _U32(2 * (step % 2))) & _U32(0x33333333)
        move = 2 - step % 4
        high = words[1] << _U32(move) if move >= 0 else words[1] >> _U32(-move)
        return [byte(low | (high & _U32(0x44444444)), q) for q in range(4)]
    return [byte(words[q // 2], 2 * (q % 2) + v) for q in range(4) for v in range(2)]


def emulate(
    words: tuple[jax.Array, ...],
    table: jax.Array,
    bits: int,
    steps: range,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What the inline PTX computes, in jax.numpy: ``dtype[64, 16 * len(steps)]``.

    Args:
      words: The words of a slice, ``uint32[words of a thread, 128]`` for each plane.
      table: ``uint32[rows, 64]`` as in shared memory.
      bits: Bits a code.
      steps: The steps of 16 rows within the slice.
      dtype: bfloat16 or float16.
    """
    vectors = [w.reshape(-1, 128, n) for w, n in zip(words, vector_lengths(bits), strict=True)]
    blocks = []
    for step in steps:
        used = []
        for plane, word in words_of_step(bits, step):
            row, column = divmod(word, vectors[plane].shape[-1])
            used.append(vectors[plane][row, :, column])
        entries = [b.astype(jnp.int32) for b in lookup_bytes(used, bits, step)]
        if bits == 2:
            registers = [table[entries[c], r] for c in range(2) for r in range(2)]
        elif bits == 8:
            first, second = ([table[entries[2 * q + v], 0] for q in range(4)] for v in range(2))
            registers = [a | b << _U32(16) for a, b in zip(first, second, strict=True)]
        else:
            registers = [table[e, 0] for e in entries]
        both = jnp.stack([jnp.stack([r & _U32(0xFFFF), r >> _U32(16)]) for r in registers])
        values = jax.lax.bitcast_convert_type(both.astype(jnp.uint16), dtype)
        values = values.reshape(2, 2, 2, 4, 8, 4)  # c, r, v, warp, g, t
        blocks.append(values.transpose(3, 1, 4, 0, 5, 2).reshape(64, 16))
    return jnp.concatenate(blocks, axis=1)


def fill_lookup_table(table: Any, entries: Any) -> None:
    """What ``mosaic_gpu_asm.fill_table`` does, in jax.numpy."""
    rows = table.shape[0]
    pairs = [jnp.broadcast_to(entries[i, :rows][:, None], (rows, 32)) for i in range(2)]
    table[...] = jnp.stack(pairs, axis=2).reshape(rows, 64)


def lookup_table(lut: jax.Array, bits: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What the kernel looks up in, ``uint32[3, 256]``.

    Two rows are the entries of every byte, for the (first, second) register. At 2 and 3 bits the
    last one begins with the byte planes that permutes look up in: low bytes of four values a word,
    then high bytes.

    Args:
      lut: ``float[1, 2**(bits * p), p]``, p = 1 or 2.
      bits: Bits a row.
      dtype: bfloat16 or float16, of the weights.
    """
    p = lut.shape[2]
    half = jax.lax.bitcast_convert_type(lut[0].astype(dtype), jnp.uint16).astype(_U32)
    byte, mask = np.arange(256), 2**bits - 1

    def pair(low: np.ndarray, high: np.ndarray) -> jax.Array:
        """The values of two neighbouring rows, from the parts of a byte that are theirs."""
        if p == 2:
            low = high = low | high << bits
        return half[low, 0] | half[high, p - 1] << _U32(16)

    if bits == 8:
        first = second = half[:, 0]
    elif bits == 2:
        code = [byte >> shift & mask for shift in (0, 2, 4, 6)]
        first, second = (pair(code[r], code[2 + r]) for r in range(2))
    else:
        first = second = pair(byte & mask, byte >> 4 & mask)
    count = byte_plane_words(bits, p)
    both = jnp.stack([half[:, 0] & _U32(255), half[:, 0] >> _U32(8)]).reshape(-1, 4)
    planes = jnp.zeros(256, _U32).at[:count].set(_join(both, 8, (-1,))[:count])
    return jnp.stack([first, second, planes])


def byte_plane_words(bits: int, p: int = 1) -> int:
    """Words that byte permutes look up in; none for tables of more than eight values."""
    return 2 ** (bits - 1) if bits in (2, 3) and p == 1 else 0


def table_rows(bits: int) -> int:
    """Rows of the table in shared memory."""
    return 0x78 if bits == 3 else 256
