"""The lookup-table product as Triton kernels; needs Triton, but neither a GPU nor jax-triton.

A program dequantises tiles of ``BLOCK_K x BLOCK_N`` codes, read from the canonical words, and
multiplies them on the tensor cores. One table of at most 16 entries in 16 bits lives in registers
(:mod:`triton_ptx`); entries of all other tables are loaded through the first-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.lut_matmul import triton_ptx

_PTX_2, _CONSTRAINTS_2 = map(tl.constexpr, triton_ptx.lookup(2))
_PTX_3, _CONSTRAINTS_3 = map(tl.constexpr, triton_ptx.lookup(3))
_PTX_4, _CONSTRAINTS_4 = map(tl.constexpr, triton_ptx.lookup(4))


@triton.jit
def _bytes(words, row, columns, ROWS, N: tl.constexpr):
    """Bytes of a matrix ``[ROWS, N]`` of packed words; zero outside."""
    inside = (row < ROWS)[:, None] & (columns < N)[None, :]
    return tl.load(words + row[:, None] * N + columns[None, :], mask=inside, other=0)


@triton.jit
def _join4(a, b, c, d):
    """Four tiles as one with a last axis of four."""
    tile = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tile, (a.shape[0], a.shape[1], 4))


@triton.jit
def _permuted(
    words, table, first, columns,
    K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The 16 bits of entries ``first .. first + BLOCK_K`` in ``triton_ptx.ORDER``."""
    t0 = tl.load(table)
    t1 = tl.load(table + 1)
    if BITS == 2:
        w = _bytes(words, first // 4 + tl.arange(0, BLOCK_K // 4), columns, K // 4, N)
        a, b = tl.inline_asm_elementwise(
            _PTX_2, _CONSTRAINTS_2, [w, t0, t1], (tl.int32, tl.int32), is_pure=True, pack=4
        )
        pairs = tl.join(a, b)
    elif BITS == 3:
        t2 = tl.load(table + 2)
        t3 = tl.load(table + 3)
        rows = (first // 8 + tl.arange(0, BLOCK_K // 8)) * 3
        w0 = _bytes(words, rows, columns, K // 8 * 3, N)
        w1 = _bytes(words, rows + 1, columns, K // 8 * 3, N)
        w2 = _bytes(words, rows + 2, columns, K // 8 * 3, N)
        a, b, c, d = tl.inline_asm_elementwise(
            _PTX_3, _CONSTRAINTS_3, [w0, w1, w2, t0, t1, t2, t3],
            (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=4,
        )  # fmt: skip
        pairs = _join4(a, b, c, d)
    else:
        t2 = tl.load(table + 2)
        t3 = tl.load(table + 3)
        t4 = tl.load(table + 4)
        t5 = tl.load(table + 5)
        t6 = tl.load(table + 6)
        t7 = tl.load(table + 7)
        w = _bytes(words, first // 2 + tl.arange(0, BLOCK_K // 2), columns, K // 2, N)
        pairs = tl.inline_asm_elementwise(
            _PTX_4, _CONSTRAINTS_4, [w, t0, t1, t2, t3, t4, t5, t6, t7], tl.int32, is_pure=True,
            pack=4,
        )[:, :, None]  # fmt: skip
    tile = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    tile = tl.reshape(tile, (tile.shape[0], BLOCK_N, tile.shape[2] * 2))
    # Codes of a byte or block, which lie last, to consecutive rows.
    return tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_K, BLOCK_N))


@triton.jit
def _loaded(
    words, table, first, columns,
    K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 entries of rows ``first .. first + BLOCK_K``: any bits, any table."""
    ROWS: tl.constexpr = K // (8 * P) * BITS
    row = first + tl.arange(0, BLOCK_K)
    code_row = row // P
    bit = code_row % 8 * BITS
    place = code_row // 8 * BITS + bit // 8
    codes = _bytes(words, place, columns, ROWS, N).to(tl.int32)
    if 8 % BITS != 0:
        crosses = (bit % 8 + BITS > 8).to(tl.int32)
        high = _bytes(words, place + crosses, columns, ROWS, N).to(tl.int32)
        codes = codes | ((high * crosses[:, None]) << 8)
    codes = (codes >> (bit % 8)[:, None]) & (2**BITS - 1)
    if TABLES > 1:
        codes += tl.minimum(columns, N - 1)[None, :] * 2**BITS
    return tl.load(table + codes * P + (row % P)[:, None])


@triton.jit
def _scales(
    scales, first, columns, N: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 scales of a tile: one row if it lies within a group, else one for each row."""
    if GROUP % BLOCK_K == 0 or GROUPS == 1:
        row = tl.minimum(first // GROUP, GROUPS - 1) + tl.zeros((1,), tl.int32)
    else:
        row = tl.minimum((first + tl.arange(0, BLOCK_K)) // GROUP, GROUPS - 1)
    inside = (columns < N)[None, :]
    return tl.load(scales + row[:, None] * N + columns[None, :], mask=inside, other=0).to(
        tl.float32
    )


@triton.jit
def _tile(
    words, table, first, columns, DTYPE: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr,
    PERMUTE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Entries ``[BLOCK_K, BLOCK_N]``; the constant decides which branch is compiled."""
    if PERMUTE:
        entries = _permuted(words, table, first, columns, K, N, BITS, BLOCK_K, BLOCK_N)
        tile = entries.to(DTYPE, bitcast=True)
    else:
        tile = _loaded(words, table, first, columns, K, N, BITS, P, TABLES, BLOCK_K)
    return tile


@triton.jit
def forward(
    x, words, scales, table, y, M: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PERMUTE: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``y[split] = x @ W`` over ``STEPS`` tiles of K: ``float32[splits, M, N]``."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        first = (split * STEPS + step) * BLOCK_K
        k = first + tl.arange(0, BLOCK_K)
        inside = (rows < M)[:, None] & (k < K)[None, :]
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=inside, other=0)
        w = _tile(
            words, table, first, columns, dtype, K, N, BITS, P, TABLES, PERMUTE, BLOCK_K, BLOCK_N
        )
        scale = _scales(scales, first, columns, N, GROUP, GROUPS, BLOCK_K)
        if GROUP % BLOCK_K == 0 or GROUPS == 1:  # one scale a column: it can wait for the sum
            total += tl.dot(a, w.to(dtype), input_precision=PRECISION) * scale
        else:
            w = (w.to(tl.float32) * scale).to(dtype)
            total = tl.dot(a, w, total, input_precision=PRECISION)
    place = (split * M + rows[:, None]) * N + columns[None, :]
    tl.store(y + place, total, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def transposed(
    x, words, scales, table, y, M: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PERMUTE: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``y[split] = x @ W.T`` over ``STEPS`` tiles of N: ``float32[splits, M, K]``."""
    first = tl.program_id(0) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(STEPS):
        columns = (split * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        a = tl.load(x + rows[:, None] * N + columns[None, :], mask=inside, other=0)
        w = _tile(
            words, table, first, columns, dtype, K, N, BITS, P, TABLES, PERMUTE, BLOCK_K, BLOCK_N
        )
        w = (w.to(tl.float32) * _scales(scales, first, columns, N, GROUP, GROUPS, BLOCK_K)).to(
            dtype
        )
        total = tl.dot(a, tl.trans(w), total, input_precision=PRECISION)
    place = (split * M + rows[:, None]) * K + k[None, :]
    tl.store(y + place, total, mask=(rows < M)[:, None] & (k < K)[None, :])
