"""Runs the NEON kernels on any machine: a cross compiler makes them, an emulator runs them.

The program is a static one without a start-up: the emulator maps its segments, puts the arguments
beside them and calls its entry point.
"""

from __future__ import annotations

import ctypes
import pathlib
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import unicorn
from unicorn import arm64_const

from pallas_kernels.native import library

_PAGE = 1 << 16
_DATA, _DATA_BYTES = 0x4000_0000, 64 << 20
_STACK, _STACK_BYTES = 0x7000_0000, 8 << 20
_RETURN = 0x7F00_0000
_SCRATCH_FLOATS = 1 << 20

i64, pointer = ctypes.c_int64, ctypes.c_uint64


class Scales(ctypes.Structure):
    """``lut::Scales`` of ``csrc/kernels.h``."""

    _fields_ = [
        ("values", pointer),
        ("words", pointer),
        ("type", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("zero", ctypes.c_float),
        ("floor", ctypes.c_float),
        ("rows", i64),
        ("columns", i64),
    ]


class Problem(ctypes.Structure):
    """``lut::Problem``."""

    _fields_ = [
        ("x", pointer),
        ("words", pointer),
        ("scales", Scales),
        ("offsets", Scales),
        *((name, pointer) for name in ("lut", "y", "sums")),
        *((name, i64) for name in ("m", "k", "n", "rows", "group", "tables")),
        ("bits", ctypes.c_int32),
    ]


class DenseProblem(ctypes.Structure):
    """``lut::DenseProblem``."""

    _fields_ = [
        ("weight", pointer),
        ("y", pointer),
        ("m", i64),
        ("n", i64),
        ("bfloat16", ctypes.c_bool),
    ]


class Live(ctypes.Structure):
    """``lut::Live``."""

    _fields_ = [("rows", pointer), ("x", pointer), ("ends", pointer), ("count", i64)]


class Call(ctypes.Structure):
    """``Call`` of ``neon_entry.cc``."""

    _fields_ = [
        ("kernel", i64),
        *((name, pointer) for name in ("problem", "dense", "live", "scratch")),
        ("scratch_floats", i64),
    ]


def compile_program(folder: pathlib.Path) -> bytes:
    """Compiles the NEON kernels and the entry point for 64-bit ARM, without any library."""
    zig = [sys.executable, "-m", "ziglang"]
    target = ["-target", "aarch64-linux-musl"]
    flags = ["-std=c++17", "-O2", "-w", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
    sources = {
        "kernels": [str(library.SOURCES / "kernels.cc"), "-DLUT_NEON"],
        "entry": [str(pathlib.Path(__file__).parent / "neon_entry.cc"), "-fno-builtin"],
    }
    objects = [str(folder / f"{name}.o") for name in sources]
    program = folder / "program"
    commands = [
        [*zig, "c++", *target, *flags, f"-I{library.SOURCES}", *arguments, "-c", "-o", output]
        for output, arguments in zip(objects, sources.values(), strict=True)
    ]
    link = ["-nostdlib", "-static", "-Wl,-e,Entry", *objects, "-o", str(program)]
    for command in (*commands, [*zig, "cc", *target, *link]):
        subprocess.run(command, check=True)
    return program.read_bytes()


class Emulator:
    """A 64-bit ARM processor with the program in its memory."""

    def __init__(self, program: bytes):
        self._machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._entry = _map_segments(self._machine, program)
        self._machine.mem_map(_DATA, _DATA_BYTES)
        self._machine.mem_map(_STACK, _STACK_BYTES)
        self._machine.mem_map(_RETURN, _PAGE)
        self._machine.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # allow vectors
        self._next = _DATA

    def put(self, value: Any) -> int:
        """Copies an array or a structure into memory; its address, 0 for None."""
        if value is None:
            return 0
        data = value.tobytes() if isinstance(value, np.ndarray) else bytes(value)
        address = self._reserve(len(data))
        self._machine.mem_write(address, data)
        return address

    def get(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array in memory."""
        data = self._machine.mem_read(address, 4 * int(np.prod(shape)))
        return np.frombuffer(bytes(data), np.float32).reshape(shape)

    def run(self, kernel: int, **structures: Any) -> None:
        """Calls a kernel; memory that :meth:`put` gave is free for others afterwards."""
        call = Call(
            kernel,
            scratch=self._reserve(4 * _SCRATCH_FLOATS),
            scratch_floats=_SCRATCH_FLOATS,
            **{name: self.put(value) for name, value in structures.items()},
        )
        address = self.put(call)
        machine = self._machine
        machine.reg_write(arm64_const.UC_ARM64_REG_X0, address)
        machine.reg_write(arm64_const.UC_ARM64_REG_SP, _STACK + _STACK_BYTES - 64)
        machine.reg_write(arm64_const.UC_ARM64_REG_LR, _RETURN)
        machine.emu_start(self._entry, _RETURN)
        after = Call.from_buffer_copy(machine.mem_read(address, ctypes.sizeof(Call)))
        assert after.scratch_floats <= _SCRATCH_FLOATS, after.scratch_floats
        self._next = _DATA

    def _reserve(self, size: int) -> int:
        address = self._next
        self._next = -(-(address + size) // 64) * 64
        assert self._next <= _DATA + _DATA_BYTES
        return address


def _map_segments(machine: unicorn.Uc, program: bytes) -> int:
    """Loads an ELF file; returns its entry point."""
    entry, headers = struct.unpack_from("<QQ", program, 24)
    size, count = struct.unpack_from("<HH", program, 54)
    for i in range(count):
        kind, _, offset, address, _, stored, total = struct.unpack_from(
            "<IIQQQQQ", program, headers + i * size
        )
        if kind != 1 or not total:
            continue
        for page in range(address // _PAGE * _PAGE, address + total, _PAGE):
            if not any(start <= page <= end for start, end, _ in machine.mem_regions()):
                machine.mem_map(page, _PAGE)
        machine.mem_write(address, program[offset : offset + stored])
    return entry
