"""The Hopper kernel's layout and its PTX, emulated instruction by instruction."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layout import pack
from pallas_kernels.lut_matmul import mosaic_gpu_asm
from pallas_kernels.lut_matmul.mosaic_gpu_layout import (
    bits_of_row,
    byte_plane_words,
    emulate,
    lookup_bytes,
    lookup_table,
    pack_fragments,
    table_rows,
    vector_lengths,
    words_of_step,
)

BITS = [2, 3, 4, 8]
BASE = 1 << 20


def shared_memory(bits: int, table: np.ndarray) -> np.ndarray:
    """The table as the kernel fills it: one copy a lane, 256 bytes an entry."""
    rows = table_rows(bits)
    shared = np.repeat(table[0][:rows, None], 64, axis=1)
    if bits == 2:
        shared[:, 1::2] = table[1][:rows, None]
    return shared


def prmt(a: int, b: int, selector: int) -> int:
    pool = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
    picked = [pool[selector >> 4 * i & 7] for i in range(4)]
    assert not any(selector >> 4 * i & 8 for i in range(4)), "sign replication is not meant here"
    return sum(byte << 8 * i for i, byte in enumerate(picked))


def execute(asm: str, state: dict, shared: np.ndarray, words: np.ndarray | None = None) -> None:
    """Runs the few instructions of the inline PTX on one thread's registers, ``state``.

    ``shared`` begins at address BASE, ``words`` at 0. Matrices are not transposed between lanes.
    """

    def value(name: str) -> int:
        return state[name] if name in state else int(name, 0)

    for statement in asm.strip("{}\n").split(";"):
        op, _, rest = statement.strip().partition(" ")
        if op in ("", ".reg"):
            continue
        names = re.findall(r"[$\w]+", rest)
        if op.startswith(("ld.", "st.")):
            count = 4 if ".v4." in op else 2 if ".v2." in op else 1
            if op.startswith("ld."):
                registers, (register, *offset) = names[:count], names[count:]
            else:
                registers, (register, *offset) = names[-count:], names[:-count]
            address = value(register) + sum(map(int, offset))
            assert address % (4 * count) == 0
            memory = shared if address >= BASE else words
            assert memory is not None
            first = (address - BASE if address >= BASE else address) // 4
            if op.startswith("ld."):
                state |= zip(registers, map(int, memory.flat[first : first + count]), strict=True)
            else:
                memory.flat[first : first + count] = [value(name) for name in registers]
            continue
        target, *sources = names
        a, *others = map(value, sources)
        match op:
            case "prmt.b32":
                state[target] = prmt(a, *others)
            case "mov.b32" | "movmatrix.sync.aligned.m8n8.trans.b16":
                state[target] = a
            case "add.u32":
                state[target] = a + others[0]
            case "mad.lo.u32" | "mad.wide.u32":
                state[target] = a * others[0] + others[1]
            case "min.u32":
                state[target] = min(a, others[0])
            case "shr.u32":
                state[target] = a >> others[0]
            case "shl.b32":
                state[target] = (a << others[0]) & 0xFFFFFFFF
            case "and.b32":
                state[target] = a & others[0]
            case "lop3.b32":
                assert others[2] == 0xEA  # (a & b) | c
                state[target] = (a & others[0]) | others[1]
            case _:
                raise AssertionError(f"unknown instruction {op}")


def run_ptx(
    asm: str, operands: list[int], shared: np.ndarray, words: np.ndarray | None = None
) -> list[int]:
    """The four registers that the PTX of a step computes from operands 4 and on."""
    state = {f"${4 + i}": value for i, value in enumerate(operands)}
    execute(asm, state, shared, words)
    return [state[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("bits", BITS)
def test_ptx_does_what_the_emulation_says(bits):
    rng = np.random.default_rng(bits)
    lut = rng.standard_normal((1, 2**bits, 1)).astype(np.float32)
    table = np.asarray(lookup_table(jnp.asarray(lut), bits, jnp.bfloat16))
    shared = shared_memory(bits, table)
    for step in range(8):
        asm, count = mosaic_gpu_asm._step_asm(bits, step)
        assert count == len(words_of_step(bits, step))
        for _ in range(20):
            words = [int(w) for w in rng.integers(0, 2**32, count)]
            lane = int(rng.integers(32))
            got = run_ptx(asm, [*words, lane * (8 if bits == 2 else 4), BASE], shared)
            arrays = [jnp.asarray([w], jnp.uint32) for w in words]
            entries = [int(b[0]) for b in lookup_bytes(arrays, bits, step)]
            if bits == 2:
                expected = [table[r, entries[c]] for c in range(2) for r in range(2)]
            elif bits == 8:
                expected = [
                    table[0, entries[2 * q]] | table[0, entries[2 * q + 1]] << 16 for q in range(4)
                ]
            else:
                expected = [table[0, e] for e in entries]
            assert got == [int(e) for e in expected]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
def test_ptx_fills_the_table(bits, warpgroups):
    entries = np.random.default_rng(bits).integers(0, 2**32, (3, 256), dtype=np.uint32)
    if bits != 2:
        entries[1] = entries[0]
    shared = np.zeros((table_rows(bits), 64), np.uint32)
    asm = mosaic_gpu_asm._fill_asm(bits, 128 * warpgroups)
    for thread in range(128 * warpgroups):
        execute(asm, {"$0": thread, "$1": BASE, "$2": 0}, shared, entries)
    used = 64 if bits == 2 else 32  # the places of the lanes
    np.testing.assert_array_equal(shared[:, :used], shared_memory(bits, entries)[:, :used])


@pytest.mark.parametrize("bits", [2, 3])
def test_permutes_look_up_the_same_values(bits):
    rng = np.random.default_rng(bits)
    lut = rng.standard_normal((1, 2**bits, 1)).astype(np.float32)
    table = np.asarray(lookup_table(jnp.asarray(lut), bits, jnp.bfloat16))
    planes = [int(plane) for plane in table[2, : byte_plane_words(bits)]]
    for step in range(8):
        words = [int(w) for w in rng.integers(0, 2**32, len(words_of_step(bits, step)))]
        entry = 8 if bits == 2 else 4
        expected, _ = mosaic_gpu_asm._step_asm(bits, step)
        permutes, count = mosaic_gpu_asm._permute_asm(bits, step)
        assert count == len(words) + len(planes) and "ld." not in permutes
        shared = shared_memory(bits, table)
        assert run_ptx(permutes, [*words, *planes], shared) == run_ptx(
            expected, [*words, entry, BASE], shared
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits,p", [*((bits, 1) for bits in BITS), (2, 2), (3, 2), (4, 2)])
def test_fragments_hold_the_transposed_weight(bits, p, dtype):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2 ** (bits * p), (200 // p, 100)).astype(np.uint8)
    lut = rng.standard_normal((1, 2 ** (bits * p), p)).astype(np.float32)
    canonical = pack(jnp.asarray(codes), bits * p)
    assert bits_of_row(canonical, p) == bits
    planes = pack_fragments(canonical, 256, 128, p)
    lengths = vector_lengths(bits)
    assert sum(p.nbytes for p in planes) == 256 * 128 * bits // 8
    assert len(lengths) == len(planes)
    shared = jnp.asarray(
        shared_memory(bits, np.asarray(lookup_table(jnp.asarray(lut), bits, dtype)))
    )
    values = np.asarray(jnp.asarray(lut, dtype), np.float32)[0, codes]  # [200 / p, 100, p]
    dense = np.zeros((256, 128), np.float32)
    dense[:200, :100] = values.swapaxes(1, 2).reshape(200, 100)
    for tile in range(2):
        for part in range(2):
            words = tuple(plane[tile, part] for plane in planes)
            weight = np.asarray(emulate(words, shared, bits, range(8), dtype), np.float32)
            expected = dense[128 * part : 128 * part + 128, 64 * tile : 64 * tile + 64].T
            used_n, used_k = max(0, min(64, 100 - 64 * tile)), max(0, min(128, 200 - 128 * part))
            np.testing.assert_array_equal(weight[:used_n, :used_k], expected[:used_n, :used_k])


def test_codes_of_other_sizes_have_no_bits_of_a_row():
    def bits(code: int, p: int) -> int | None:
        return bits_of_row(np.zeros((1, code, 8), np.uint8), p)

    assert [bits(code, 1) for code in (1, 2, 5, 8)] == [None, 2, None, 8]
    assert [bits(code, 2) for code in (2, 5, 6, 8)] == [None, None, 3, 4]
    assert bits(8, 4) is None


@pytest.mark.parametrize("bits", BITS)
def test_transposed_ptx_reads_the_words_of_the_forward_kernel(bits):
    half = 1
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (128, 64)).astype(np.uint8)
    lut = rng.standard_normal((1, 2**bits, 1)).astype(np.float32)
    planes = pack_fragments(pack(jnp.asarray(codes), bits), 128, 64)
    shared = shared_memory(bits, np.asarray(lookup_table(jnp.asarray(lut), bits, jnp.bfloat16)))
    flat = [np.asarray(plane).ravel() for plane in planes]
    starts = [0, 4 * flat[0].size]
    words = np.concatenate(flat)
    places = mosaic_gpu_asm._PLACES[bits]
    fragment = np.zeros((64, 64), np.uint16)
    for warp in range(4):
        for block in range(4):
            asm, count = mosaic_gpu_asm._transposed_asm(bits, block)
            registers = np.zeros((4, 8, 4, 2), np.uint16)  # register, g, t, v
            for lane in range(32):
                addresses = [
                    start
                    + 4 * lane * p.lane_words
                    + 4 * (warp // 2 * p.odd_pair + warp % 2 * p.odd_warp + half * p.half_words)
                    for start, p in zip(starts, places, strict=False)
                ]
                shifts = [warp % 2 * p.odd_bits + warp * p.warp_bits for p in places]
                operands = [*addresses, *(shifts if count > len(places) else [])]
                found = run_ptx(
                    asm, [*operands, lane * (8 if bits == 2 else 4), BASE], shared, words
                )
                for q, value in enumerate(found):
                    registers[q, lane // 4, lane % 4] = value & 0xFFFF, value >> 16
            matrices = registers.reshape(4, 8, 8).swapaxes(1, 2)  # movmatrix
            for q in range(4):  # register 2 c + r holds rows 8 r.. and columns 8 c..
                c, r = divmod(q, 2)
                rows = slice(16 * warp + 8 * r, 16 * warp + 8 * r + 8)
                fragment[rows, 16 * block + 8 * c : 16 * block + 8 * c + 8] = matrices[q]
    values = np.asarray(jnp.asarray(lut[0, :, 0], jnp.bfloat16)).view(np.uint16)
    np.testing.assert_array_equal(fragment, values[codes[64 * half : 64 * half + 64]])
