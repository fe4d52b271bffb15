"""The lookups of the Hopper kernel as inline PTX: the only file that needs private Mosaic names.

Everything here goes through ``inline_mgpu``, which takes MLIR builders; jax exposes those as
``jaxlib.mlir`` and the register layouts as ``jax.experimental.mosaic.gpu``. :func:`available` says
whether this jax has them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.lut_matmul.mosaic_gpu_layout import (
    byte_plane_words,
    table_rows,
    vector_lengths,
    words_of_step,
)

plgpu: Any = mosaic_gpu  # its interface moves with every release; see `available`


@functools.cache
def available() -> str | None:
    """None if this jax has what the kernel needs, else the reason."""
    try:
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir.dialects import arith, llvm, vector  # noqa: F401
    except ImportError as error:
        return f"Mosaic GPU is not importable in jax {jax.__version__} ({error})"
    needed = [
        (plgpu, "inline_mgpu"),
        (plgpu, "emit_pipeline_warp_specialized"),
        (mgpu, "FragmentedArray"),
        (mgpu.utils, "memref_ptr"),
        (mgpu.utils, "thread_idx"),
    ]
    missing = [name for module, name in needed if not hasattr(module, name)]
    return f"jax {jax.__version__} has no {', '.join(missing)}" if missing else None


def load(ref: Any, layout: Any) -> Any:
    """Reads a whole reference into registers; before jax 0.11 ``plgpu.load`` wants an index."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    indices = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
    return plgpu.load(ref, *indices, layout=layout, optimized=False)


def load_words(word_refs: Any, bits: int, *index: Any) -> tuple:
    """The words of a slice, ``word_refs[...][index]``, in registers: those of a thread together."""
    return tuple(
        load(ref.at[index], plgpu.Layout.WG_STRIDED(ref.shape[len(index) :], vec_size=length))
        for ref, length in zip(word_refs, vector_lengths(bits), strict=True)
    )


def transposed(ref: Any) -> Any:
    """A view of a matrix in shared memory; a method of references since jax 0.11."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def staging(warpgroups: int, rows: int, dtype: Any) -> Any:
    """Shared memory for 64 columns of the result of every warpgroup, as it is copied out."""
    tile = (8, 128 // jax.numpy.dtype(dtype).itemsize)
    return plgpu.SMEM(
        (warpgroups, rows, 64),
        dtype,
        transforms=(plgpu.TilingTransform(tile), plgpu.SwizzleTransform(128)),
    )


def stage(place: Any, sums: Any) -> None:
    """Stores a warpgroup's transposed sums, ``float32[64, rows]``, in its part of the staging."""
    value = plgpu.layout_cast(sums.astype(place.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    transposed(place)[...] = value
    plgpu.commit_smem()


def fill_table(table: Any, entries: Any, *, bits: int, warpgroups: int) -> None:
    """Copies the entries to every lane's place in shared memory; all warpgroups take part.

    Args:
      table: ``uint32[table_rows(bits), 64]`` in shared memory.
      entries: ``uint32[3, 256]``, see ``mosaic_gpu_layout.lookup_table``; the first two rows differ
        at 2 bits only, where they alternate.
      bits: Bits a code.
      warpgroups: How many there are, the first ones of the block.
    """
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref), return_type=None)
    def fill(ctx, table, entries):
        del ctx
        _Builder(table, bits).fill(_fill_asm(bits, 128 * warpgroups), entries)

    fill(table, entries)


def _fill_asm(bits: int, threads: int) -> str:
    """PTX that fills the table; ``$0`` the thread, ``$1`` the table, ``$2`` the entries.

    A thread stores 16 bytes of every so many rows: a warp's stores share no bank. All loads come
    before the first store, because each waits for device memory.
    """
    registers = 2 if bits == 2 else 1  # of an entry; 128 bytes of a row are used for each
    across = 8 * registers  # threads
    at_once = threads // across  # rows
    rounds = -(-table_rows(bits) // at_once)
    lines = [
        f".reg .b32 place, to, row<{rounds}>, value<{rounds * registers}>; .reg .b64 from;",
        f"and.b32 place, $0, {across - 1}; mad.lo.u32 place, place, 16, $1;",
        f"shr.u32 to, $0, {across.bit_length() - 1};",
    ]
    for i in range(rounds):  # too many threads take the last row again
        lines.append(f"add.u32 row{i}, to, {i * at_once};")
        lines.append(f"min.u32 row{i}, row{i}, {table_rows(bits) - 1};")
        lines.append(f"mad.wide.u32 from, row{i}, 4, $2;")
        lines += [
            f"ld.global.nc.b32 value{registers * i + r}, [from + {1024 * r}];"
            for r in range(registers)
        ]
    for i in range(rounds):
        first, second = (f"value{registers * i + r}" for r in (0, registers - 1))
        lines.append(f"mad.lo.u32 to, row{i}, 256, place;")
        lines.append(f"st.shared.v4.b32 [to], {{{first}, {second}, {first}, {second}}};")
    return "{\n" + "\n".join(lines) + "\n}"


def _address(byte: int, word: str, register: str) -> str:
    """PTX: the address of the lane's copy of entry ``byte`` of ``word``."""
    return (
        f"prmt.b32 {register}, {word}, $LANE, {0x6504 | byte << 4:#x};"
        f" add.u32 {register}, {register}, $BASE;"
    )


def _lookup_lines(bits: int, step: int, words: list[str], results: list[str]) -> list[str]:
    """PTX for the four registers of one step of 16 rows, from the names of its words."""
    lines: list[str] = []
    if bits == 4:
        for q in range(4):
            lines += [_address(q, words[0], f"a{q}"), f"ld.shared.b32 {results[q]}, [a{q}];"]
    elif bits == 2:
        for c in range(2):
            lines += [
                _address(2 * (step % 2) + c, words[0], f"a{c}"),
                f"ld.shared.v2.b32 {{{results[2 * c]}, {results[2 * c + 1]}}}, [a{c}];",
            ]
    elif bits == 3:
        lines += _join_lines(step, words)
        for q in range(4):
            lines += [_address(q, "p", f"a{q}"), f"ld.shared.b32 {results[q]}, [a{q}];"]
    else:
        for q in range(4):  # register 2 c + r from word c, bytes 2 r and 2 r + 1
            c, r = divmod(q, 2)
            for v in range(2):
                lines += [
                    _address(2 * r + v, words[c], f"a{v}"),
                    f"ld.shared.b32 p{v}, [a{v}];",
                ]
            lines.append(f"prmt.b32 {results[q]}, p0, p1, 0x5410;")
    return lines


def _join_lines(step: int, words: list[str]) -> list[str]:
    """PTX for the 3-bit codes of a step, a nibble each: in order c, r, v in register p."""
    low, move = words[0], 2 - step % 4
    lines = []
    if step % 2:
        lines.append(f"shr.u32 p, {low}, 2;")
        low = "p"
    lines.append(f"and.b32 p, {low}, 0x33333333;")
    high = words[1] if move == 0 else "h"
    if move:
        direction = "shl.b32" if move > 0 else "shr.u32"
        lines.append(f"{direction} h, {words[1]}, {abs(move)};")
    lines.append(f"lop3.b32 p, {high}, 0x44444444, p, 0xEA;")
    return lines


def _permute_lines(
    bits: int, step: int, words: list[str], planes: list[str], results: list[str]
) -> list[str]:
    """PTX for the same registers as ``_lookup_lines`` without shared memory, at 2 and 3 bits."""
    count = len(planes) // 2
    low, high = (f"{plane[0]}, {plane[-1]}" for plane in (planes[:count], planes[count:]))
    lines = _join_lines(step, words) if bits == 3 else []
    for i in range(2):  # a selector has four nibbles
        if bits == 3:
            lines.append("mov.b32 h, p;" if i == 0 else "shr.u32 h, p, 16;")
            targets = results[2 * i], results[2 * i + 1]  # r of c = i
        else:
            source = words[0]
            if i:
                lines.append(f"shr.u32 h, {source}, 2;")
                source = "h"
            lines.append(f"and.b32 h, {source}, 0x33333333;")
            if step % 2:
                lines.append("shr.u32 h, h, 16;")
            targets = results[i], results[2 + i]  # c of r = i
        lines.append(f"prmt.b32 p0, {low}, h; prmt.b32 p1, {high}, h;")
        lines += [
            f"prmt.b32 {target}, p0, p1, {selector:#x};"
            for target, selector in zip(targets, (0x5140, 0x7362), strict=True)
        ]
    return lines


def _assemble(lines: list[str], operands: int) -> str:
    """The text of inline PTX whose last two operands are the lane's offset and the table."""
    body = "\n".join(lines)
    body = body.replace("$LANE", f"${4 + operands}").replace("$BASE", f"${5 + operands}")
    registers = "a0, a1, a2, a3, p, h, p0, p1, w0, w1, r0, r1, r2, r3"
    return f"{{\n.reg .b32 {registers};\n{body}\n}}"


def _step_asm(bits: int, step: int) -> tuple[str, int]:
    """PTX for the four registers of one step of 16 rows; and how many words it takes.

    Operands: ``$0..$3`` results, then the words, then the lane's offset and the table's address.
    """
    count = len(words_of_step(bits, step))
    words = [f"${4 + i}" for i in range(count)]
    return _assemble(_lookup_lines(bits, step, words, [f"${q}" for q in range(4)]), count), count


def _permute_asm(bits: int, step: int) -> tuple[str, int]:
    """The same, with the byte planes as operands after the words."""
    count = len(words_of_step(bits, step))
    names = [f"${i}" for i in range(4 + count + byte_plane_words(bits))]
    lines = _permute_lines(bits, step, names[4 : 4 + count], names[4 + count :], names[:4])
    operands = count + byte_plane_words(bits)
    return _assemble(lines, operands), operands


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a thread of the transposed kernel finds its words of a plane, in words of 32 bits.

    At ``lane * lane_words + warp // 2 * odd_pair + warp % 2 * odd_warp + half * half_words + block
    * block_words``; the codes of step 0 are at bit ``warp % 2 * odd_bits + warp * warp_bits``.
    """

    lane_words: int
    odd_pair: int
    odd_warp: int
    half_words: int
    block_words: int
    odd_bits: int = 0
    warp_bits: int = 0


_PLACES = {
    2: [_Place(4, 1, 0, 2, 128, odd_bits=16)],
    3: [_Place(4, 1, 0, 2, 128, odd_bits=2), _Place(2, 0, 0, 1, 64, warp_bits=1)],
    4: [_Place(4, 2, 1, 512, 128)],
    8: [_Place(4, 512, 2, 1024, 128)],
}


def _transposed_asm(bits: int, block: int) -> tuple[str, int]:
    """PTX for the four registers of 16 rows k and block ``block`` of 16 columns n.

    Operands: ``$0..$3`` results; for each plane the address of block 0 and, below 4 bits, a shift;
    then the lane's offset and the table's address. Returns the text and the number of operands
    between the results and those two.
    """
    places = _PLACES[bits]
    shifted = any(place.odd_bits or place.warp_bits for place in places)
    lines: list[str] = []
    for i, place in enumerate(places):
        address = f"[${4 + i} + {4 * block * place.block_words}]"
        lines.append(
            f"ld.shared.v2.b32 {{w0, w1}}, {address};"
            if bits == 8
            else f"ld.shared.b32 w{i}, {address};"
        )
        if shifted:
            lines.append(f"shr.u32 w{i}, w{i}, ${4 + len(places) + i};")
    lines += _lookup_lines(bits, 0, ["w0", "w1"], [f"r{q}" for q in range(4)])
    # register 2 c + r becomes 2 r + c
    lines += [
        f"movmatrix.sync.aligned.m8n8.trans.b16 ${2 * (q % 2) + q // 2}, r{q};" for q in range(4)
    ]
    operands = len(places) * (1 + shifted)
    return _assemble(lines, operands), operands


def load_byte_planes(entries: Any, bits: int, p: int) -> tuple:
    """What byte permutes look up in, scalars; ``entries`` as in :func:`fill_table`."""
    return tuple(entries[2, i] for i in range(byte_plane_words(bits, p)))


def dequantize(
    words: tuple, table_ref: Any, byte_planes: tuple = (), *, bits: int, steps: range, dtype: Any
) -> Any:
    """``dtype[64, 16 * len(steps)]`` in the layout of a wgmma operand.

    Args:
      words: The words of a slice, ``uint32[words of a thread, 128]`` for each plane.
      table_ref: ``uint32[rows, 64]`` in shared memory.
      byte_planes: See :func:`load_byte_planes`; if there are any, odd steps are looked up by byte
        permutes, so that shared memory and arithmetic share the work.
      bits: Bits a code.
      steps: The steps of 16 rows within the slice.
      dtype: bfloat16 or float16.
    """
    layout, lengths = plgpu.Layout, vector_lengths(bits)
    arg_types = tuple(
        layout.WG_STRIDED(w.shape, vec_size=n) for w, n in zip(words, lengths, strict=True)
    )
    shape = (64, 16 * len(steps))

    @plgpu.inline_mgpu(
        arg_types=(*arg_types, plgpu.RefType(), *[layout.WG_SPLAT(())] * len(byte_planes)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout.WGMMA),
    )
    def lookup(ctx, *operands):
        del ctx
        (*planes, table), scalars = operands[: len(lengths) + 1], operands[len(lengths) + 1 :]
        build = _Builder(table, bits)
        flat = [list(plane.registers.flat) for plane in planes]
        byte_planes = [scalar.registers.item() for scalar in scalars]
        registers: list[Any] = []
        for step in steps:
            used = []
            for plane, word in words_of_step(bits, step):
                row, column = divmod(word, lengths[plane])
                used.append(build.vector.extract(flat[plane][row], [], [column]))
            if byte_planes and step % 2:
                registers += build.look_up(_permute_asm(bits, step)[0], [*used, *byte_planes])
            else:
                registers += build.look_up(_step_asm(bits, step)[0], used)
        return build.array(registers, shape, dtype)

    return lookup(*words, table_ref, *byte_planes)


def dequantize_transposed(
    word_refs: list, table_ref: Any, *, bits: int, half: int | None, dtype: Any
) -> Any:
    """``dtype[64, 64]`` of the weight itself, rows k by columns n, as a wgmma operand.

    Warp w takes the 16 rows of step 4 ``half`` + w, and of every warp of the forward kernel the 16
    columns n that it holds; transposing the registers' 8 x 8 matrices swaps the parts of k and n.

    Args:
      word_refs: For each plane ``uint32[words of a thread, 128]`` in shared memory: a slice.
      table_ref: ``uint32[rows, 64]`` in shared memory.
      bits: Bits a code.
      half: Which 64 rows of the slice; None: the warpgroup's index modulo 2.
      dtype: bfloat16 or float16.
    """
    shape = (64, 64)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * (len(word_refs) + 1),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )
    def lookup(ctx, *operands):
        del ctx
        *planes, table = operands
        build = _Builder(table, bits)
        places = _PLACES[bits]
        used = [build.start(*pair, half) for pair in zip(planes, places, strict=True)]
        if _transposed_asm(bits, 0)[1] > len(places):
            used += [build.shift(place) for place in places]
        registers: list[Any] = []
        for block in range(4):
            registers += build.look_up(_transposed_asm(bits, block)[0], used, converges=True)
        return build.array(registers, shape, dtype)

    return lookup(*word_refs, table_ref)


class _Builder:
    """MLIR's builders and the values that every lookup needs."""

    def __init__(self, table: Any, bits: int):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        self._mgpu: Any = mgpu
        self._ir: Any = ir
        self._arith: Any = arith
        self._llvm: Any = llvm
        self.vector: Any = vector
        self._i32 = ir.IntegerType.get_signless(32)
        self._thread = mgpu.utils.thread_idx()
        self._table = self._address(table)
        self._lane = self._bits(0, 5)
        self._entry = self._times(self._lane, 8 if bits == 2 else 4)

    def _constant(self, value: int) -> Any:
        return self._arith.constant(self._i32, value)

    def _times(self, value: Any, factor: int) -> Any:
        return self._arith.muli(value, self._constant(factor))

    def _bits(self, first: int, count: int) -> Any:
        """Some bits of the thread's index: 0..4 the lane, 5..6 the warp, 7 the warpgroup."""
        moved = self._arith.shrui(self._thread, self._constant(first))
        return self._arith.andi(moved, self._constant(2**count - 1))

    def _address(self, ref: Any) -> Any:
        """The address of a reference in shared memory."""
        return self._llvm.ptrtoint(self._i32, self._mgpu.utils.memref_ptr(ref))

    def fill(self, asm: str, entries: Any) -> None:
        """Runs the PTX that fills the table from ``entries`` in device memory."""
        i64 = self._ir.IntegerType.get_signless(64)
        source = self._llvm.ptrtoint(i64, self._mgpu.utils.memref_ptr(entries))
        self._llvm.inline_asm(
            self._ir.Type.parse("!llvm.void"),
            [self._thread, self._table, source],
            asm,
            "r,r,l,~{memory}",
            has_side_effects=True,
            asm_dialect=0,
        )

    def start(self, plane: Any, place: _Place, half: int | None) -> Any:
        """The address of the thread's words of block 0."""
        address = self._address(plane)
        for bits, factor in (
            (self._lane, place.lane_words),
            (self._bits(6, 1), place.odd_pair),
            (self._bits(5, 1), place.odd_warp),
            (self._bits(7, 1) if half is None else self._constant(half), place.half_words),
        ):
            address = self._arith.addi(address, self._times(bits, 4 * factor))
        return address

    def shift(self, place: _Place) -> Any:
        """The first bit of the thread's codes in its words."""
        odd = self._times(self._bits(5, 1), place.odd_bits)
        return self._arith.addi(odd, self._times(self._bits(5, 2), place.warp_bits))

    def look_up(self, asm: str, operands: list, *, converges: bool = False) -> list:
        """The four registers that the PTX of a step computes; ``converges``: it needs all lanes."""
        four = self._ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
        operands = [*operands, self._entry, self._table]
        values = self._llvm.inline_asm(
            four,
            operands,
            asm,
            ",".join(["=&r"] * 4 + ["r"] * len(operands)),  # written before all are read
            has_side_effects=converges,
            asm_dialect=0,
        )
        return [self._llvm.extractvalue(self._i32, values, [q]) for q in range(4)]

    def array(self, values: list, shape: tuple, dtype: Any) -> Any:
        """An array of 16-bit floats in the layout of a wgmma operand, from its registers."""
        ir, vector = self._ir, self.vector
        element = ir.BF16Type.get() if dtype == jax.numpy.bfloat16 else ir.F16Type.get()
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        one, pair = ir.VectorType.get((1,), self._i32), ir.VectorType.get((2,), element)
        # in order of step, then c, then r
        for place, value in zip(np.ndindex(registers.shape), values, strict=True):
            registers[place] = vector.bitcast(pair, vector.from_elements(one, [value]))
        return self._mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
