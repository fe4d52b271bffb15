"""Runs the Triton kernels over the shared cases in Triton's interpreter; prints JSON lines.

A program of its own, because Triton decides when it is imported whether it interprets. The
interpreter lacks inline PTX and bfloat16 products; both are added here: the PTX is emulated
instruction by instruction on whole tensors.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1] / "lut_matmul"), str(Path(__file__).parents[3])]

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from lut_cases import CASES, Case, make, oracle, relative_error  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from pallas_kernels.lut_matmul import reference  # noqa: E402
from pallas_kernels.lut_matmul import triton as implementation  # noqa: E402
from pallas_kernels.lut_matmul.epilogue import add_offsets  # noqa: E402

PERMUTED = [
    Case(bits=2, k=512, n=256, group_size=128),
    Case(bits=3, k=512, n=256, group_size=128, dtype="float16"),
    Case(bits=4, m=16, k=1024, n=256, group_size=256),
    Case(bits=2, transpose=True, k=200, n=72, group_size=64),
]


class Pointer:
    """An array as the interpreter wants its arguments: like a torch tensor in host memory."""

    def __init__(self, array: jax.Array):
        self.array = np.array(array)
        self.dtype = f"torch.{self.array.dtype}"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> Pointer:
        return self

    def cpu(self) -> Pointer:
        return self

    def new_empty(self, *_: object, **__: object) -> Pointer:
        other = Pointer.__new__(Pointer)
        other.dtype = self.dtype
        return other

    def set_(self, storage: Pointer, *_: object) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    stride = size

    def copy_(self, other: Pointer) -> None:
        assert other.array is self.array


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = (b.astype(np.uint64) << np.uint64(32)) | a
    total = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        assert not (nibble & 8).any(), "sign replication is not meant here"
        byte = (pool >> (nibble.astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        total |= byte.astype(np.uint32) << np.uint32(8 * i)
    return total


def run_ptx(asm: str, state: dict[str, np.ndarray], outputs: int) -> list[np.ndarray]:
    """Runs the few instructions of the lookups on arrays of registers."""
    shape = next(iter(state.values())).shape
    ops = {
        "prmt.b32": prmt,
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "shr.u32": np.right_shift,
        "shl.b32": np.left_shift,
        "lop3.b32": lambda a, b, c, table: (a & b) | c,
    }
    for statement in asm.strip("{}").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        op, target, *sources = re.findall(r"[\w.$]+", statement)
        assert op != "lop3.b32" or sources[-1] == "0xEA"
        values = [state[s] if s in state else np.full(shape, int(s, 0), np.uint32) for s in sources]
        state[target] = ops[op](*values)
    return [state[f"${i}"] for i in range(outputs)]


class Results:
    def __init__(self, handles: list[TensorHandle]):
        self.get_result = handles.__getitem__


def inline_asm(self, asm, constraints, values, types, is_pure, pack):
    assert pack == 4 and is_pure
    outputs = constraints.count("=r")
    assert outputs == 4 * len(types)
    place, state = outputs, {}
    shape = values[0].data.shape
    for value in values:
        if value.data.dtype.itemsize == 1:  # four bytes in a register
            state[f"${place}"] = np.ascontiguousarray(value.data).reshape(-1).view(np.uint32)
            place += 1
            continue
        elements = value.data.astype(np.int32).view(np.uint32).reshape(-1, 4)
        for i in range(4):
            state[f"${place + i}"] = elements[:, i]
        place += 4
    assert place == constraints.count("r"), "as many registers as the constraints name"
    registers = run_ptx(asm, state, outputs)
    results = []
    for i in range(len(types)):
        data = np.stack(registers[4 * i : 4 * i + 4], axis=1).view(np.int32).reshape(shape)
        results.append(TensorHandle(data, tl.int32))
    return Results(results)


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    def wide(t):
        bf16 = t.dtype.scalar == tl.bfloat16
        return (t.data.view(ml_dtypes.bfloat16) if bf16 else t.data).astype(np.float32)

    return TensorHandle(wide(a) @ wide(b) + d.data, tl.float32)


InterpreterBuilder.create_inline_asm = inline_asm
InterpreterBuilder.create_dot = dot


def product(case: Case, data: dict) -> jax.Array:
    x, words, scales, lut = (data[name] for name in ("x", "words", "scales", "lut"))
    launch = implementation.prepare(x, words, scales, lut, **case.static)
    y = Pointer(np.full(launch.out_shape, np.nan, np.float32))
    launch.kernel[launch.grid](*map(Pointer, launch.operands), y, M=case.m, **launch.constants)
    result = launch.result(jax.numpy.asarray(y.array), case.k)
    return add_offsets(result, x, data["offsets"], **case.static).astype(case.dtype)


def identity_is_exact(case: Case) -> bool:
    data = make(case)
    data["x"] = jax.numpy.eye(case.k, dtype=case.dtype)
    weight = reference.dequantize(
        *(data[name] for name in ("words", "scales", "lut", "offsets")),
        k=case.k,
        group_size=case.group_size,
        dtype=case.dtype,
    )
    return bool((product(case, data) == weight).all())


def main() -> None:
    for dtype in ("bfloat16", "float32"):
        case = Case(m=64, k=64, group_size=32, dtype=dtype, offsets=dtype == "float32")
        exact = identity_is_exact(case)
        print(json.dumps({"case": "identity", "dtype": dtype, "error": 0.0, "same": exact}))
    for case in [*CASES, *PERMUTED]:
        data = make(case)
        y = product(case, data)
        same = bool((y == product(case, data)).all()) if case in PERMUTED else True
        error = relative_error(y, oracle(case, data))
        print(json.dumps({"case": str(case), "dtype": case.dtype, "error": error, "same": same}))


if __name__ == "__main__":
    main()
