"""The lookups of the Hopper kernel as inline PTX: the only file that needs private Mosaic names.

Everything here goes through ``inline_mgpu``, which takes MLIR builders; jax exposes those as
``jaxlib.mlir`` and the register layouts as ``jax.experimental.mosaic.gpu``. :func:`available` says
whether this jax has them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lut_matmul.mosaic_gpu_layout import vector_lengths, words_of_step


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
    index = inspect.signature(plgpu.load).parameters["idx"]
    indices = ((),) if index.default is inspect.Parameter.empty else ()
    return plgpu.load(ref, *indices, layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    """A view of a matrix in shared memory; a method of references since jax 0.11."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def _address(byte: int, word: str, register: str) -> str:
    """PTX: the address of the lane's copy of entry ``byte`` of ``word``."""
    return (
        f"prmt.b32 {register}, {word}, $LANE, {0x6504 | byte << 4:#x};"
        f" add.u32 {register}, {register}, $BASE;"
    )


def _step_asm(bits: int, step: int) -> tuple[str, int]:
    """PTX for the four registers of one step of 16 rows; and how many words it takes.

    Operands: ``$0..$3`` results, then the words, then the lane's offset and the table's address.
    """
    lines: list[str] = []
    if bits == 4:
        words = 1
        for q in range(4):
            lines += [_address(q, "$4", f"a{q}"), f"ld.shared.b32 ${q}, [a{q}];"]
    elif bits == 2:
        words = 1
        for c in range(2):
            lines += [
                _address(2 * (step % 2) + c, "$4", f"a{c}"),
                f"ld.shared.v2.b32 {{${2 * c}, ${2 * c + 1}}}, [a{c}];",
            ]
    elif bits == 3:
        words = 2
        nibble, crumb = 4 * (step % 2), 2 * (step % 4) - 4
        if nibble:
            lines.append(f"shr.u32 p, $4, {nibble}; and.b32 p, p, 0x0f0f0f0f;")
        else:
            lines.append("and.b32 p, $4, 0x0f0f0f0f;")
        if crumb == 0:
            high = "$5"
        else:
            move = f"shl.b32 h, $5, {-crumb};" if crumb < 0 else f"shr.u32 h, $5, {crumb};"
            lines.append(move)
            high = "h"
        lines.append(f"lop3.b32 p, {high}, 0x30303030, p, 0xEA;")
        for q in range(4):
            lines += [_address(q, "p", f"a{q}"), f"ld.shared.b32 ${q}, [a{q}];"]
    else:
        words = 2
        for q in range(4):  # register 2 c + r from word c, bytes 2 r and 2 r + 1
            c, r = divmod(q, 2)
            for v in range(2):
                lines += [
                    _address(2 * r + v, f"${4 + c}", f"a{v}"),
                    f"ld.shared.b32 p{v}, [a{v}];",
                ]
            lines.append(f"prmt.b32 ${q}, p0, p1, 0x5410;")
    body = "\n".join(lines).replace("$LANE", f"${4 + words}").replace("$BASE", f"${5 + words}")
    return "{\n.reg .b32 a0, a1, a2, a3, p, h, p0, p1;\n" + body + "\n}", words


def dequantize(words: tuple, table_ref: Any, *, bits: int, steps: range, dtype: Any) -> Any:
    """``dtype[64, 16 * len(steps)]`` in the layout of a wgmma operand.

    Args:
      words: The words of a slice, ``uint32[words of a thread, 128]`` for each plane.
      table_ref: ``uint32[rows, 64]`` in shared memory.
      bits: Bits a code.
      steps: The steps of 16 rows within the slice.
      dtype: bfloat16 or float16.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import dialects, ir
    from jaxlib.mlir.dialects import arith, llvm, vector  # noqa: F401

    build: Any = dialects  # MLIR's builders have no useful types
    layout, lengths = plgpu.Layout, vector_lengths(bits)
    entry_log2 = 3 if bits == 2 else 2
    arg_types = tuple(
        layout.WG_STRIDED(w.shape, vec_size=n) for w, n in zip(words, lengths, strict=True)
    )

    @plgpu.inline_mgpu(
        arg_types=(*arg_types, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((64, 16 * len(steps)), dtype, layout=layout.WGMMA),
    )
    def lookup(ctx, *operands):
        del ctx
        *planes, table = operands
        i32 = ir.IntegerType.get_signless(32)
        element = ir.BF16Type.get() if dtype == jax.numpy.bfloat16 else ir.F16Type.get()
        pair = ir.VectorType.get((2,), element)
        one = ir.VectorType.get((1,), i32)
        four = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
        base = build.llvm.ptrtoint(i32, mgpu.utils.memref_ptr(table))
        lane = build.arith.andi(mgpu.utils.thread_idx(), build.arith.constant(i32, 31))
        lane = build.arith.shli(lane, build.arith.constant(i32, entry_log2))
        result = layout.WGMMA.to_mgpu()
        registers = np.empty(result.registers_shape((64, 16 * len(steps))), dtype=object)
        places = list(np.ndindex(registers.shape))  # step, then c, then r
        flat = [list(plane.registers.flat) for plane in planes]
        for i, step in enumerate(steps):
            used = []
            for plane, word in words_of_step(bits, step):
                row, column = divmod(word, lengths[plane])
                used.append(build.vector.extract(flat[plane][row], [], [column]))
            asm, _ = _step_asm(bits, step)
            constraints = ",".join(["=r"] * 4 + ["r"] * (len(used) + 2))
            values = build.llvm.inline_asm(
                four,
                [*used, lane, base],
                asm,
                constraints,
                has_side_effects=False,
                asm_dialect=0,
            )
            for q in range(4):
                value = build.vector.from_elements(one, [build.llvm.extractvalue(i32, values, [q])])
                registers[places[4 * i + q]] = build.vector.bitcast(pair, value)
        return mgpu.FragmentedArray(_registers=registers, _layout=result, _is_signed=None)

    return lookup(*words, table_ref)
