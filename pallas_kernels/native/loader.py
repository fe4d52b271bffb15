"""Loads the C++ kernels once and registers their handlers with XLA."""

from __future__ import annotations

import ctypes
import functools
import logging
import pathlib

import jax
import numpy as np

from pallas_kernels.native import library

LUT_MATMUL = "pallas_kernels_lut_matmul"

SPARSE_DENSE = "pallas_kernels_sparse_dense"
SPARSE_PACKED = "pallas_kernels_sparse_packed"

_HANDLERS = {LUT_MATMUL: "LutMatmul", SPARSE_DENSE: "SparseDense", SPARSE_PACKED: "SparsePacked"}


def availability() -> str | None:
    """None if the compiled library is at hand on this machine, else the reason why not."""
    return _load()[2]


def library_path() -> pathlib.Path | None:
    """Where the library lies, or None if there is none."""
    return _load()[1]


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine has kernels for, the best one first.

    Raises:
      RuntimeError: If the library is not available.
    """
    loaded, _, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return tuple(loaded.NativeInstructions().decode().split(","))


def computes(table: np.ndarray, instructions: str = "") -> bool:
    """Whether the kernels compute the entries of a table instead of looking them up.

    Args:
      table: ``float32[2**bits]``, of 1 to 8 bits.
      instructions: One of :func:`instruction_sets`; the best one by default.

    Raises:
      RuntimeError: If the library is not available.
    """
    loaded, _, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    entries = np.ascontiguousarray(table, np.float32)
    pointer = entries.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    bits = len(entries).bit_length() - 1
    return loaded.NativeComputes(instructions.encode(), pointer, bits)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, pathlib.Path | None, str | None]:
    """The library and its path, or the reason why there is none."""
    try:
        path = library.find_or_build()
        loaded = ctypes.CDLL(str(path))
        loaded.NativeInstructions.restype = ctypes.c_char_p
        loaded.NativeComputes.restype = ctypes.c_bool
        for target, symbol in _HANDLERS.items():
            handler = jax.ffi.pycapsule(getattr(loaded, symbol))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    # BuildError is a RuntimeError; XLA raises others, such as for another version of its interface.
    except (RuntimeError, OSError, AttributeError) as error:
        logging.getLogger(__name__).warning("CPU products run through XLA: %s", error)
        return None, None, str(error)
    return loaded, path, None
