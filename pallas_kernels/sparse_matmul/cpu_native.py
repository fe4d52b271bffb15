"""The sparse product in C++ for CPUs, called through XLA's foreign function interface.

Live rows are listed once a call; threads take tiles of columns and read those rows only. The
canonical words keep two 4-bit rows in a byte, so that at 50 % sparsity three quarters of the bytes
are read, but the lookups and multiplications, which cost more than the bytes, are those of live
rows only. No repacked copy of the weight is needed. Every column is summed in the order of the
rows, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lut_matmul.cpu_native import scale_operands
from pallas_kernels.manual_axes import varying_axes
from pallas_kernels.native import SPARSE_DENSE, SPARSE_PACKED, availability
from pallas_kernels.sparse_matmul.blocks import BlockCodes
from pallas_kernels.sparse_matmul.checks import matrix_shape
from pallas_kernels.sparse_matmul.rows import RowCodes

MAX_ROWS = 4
"""Rows of ``x`` that one pass over the weight keeps in registers."""


def supports(x: Any, weight: Any, thresholds: Any) -> str | None:
    """None if the product can run, else the reason why not."""
    del thresholds
    if x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows of x; the kernels are for at most {MAX_ROWS}"
    match weight:
        case RowCodes():
            return "codes packed along N; it reads canonical words (BlockCodes)"
        case BlockCodes() if weight.lut.shape[::2] != (1, 1):
            return f"tables of shape {weight.lut.shape}; it has kernels for one of single values"
        case BlockCodes():
            return availability()
        case _ if weight.dtype not in (jnp.float32, jnp.bfloat16):
            return f"a {weight.dtype} weight; it has kernels for float32 and bfloat16"
    return availability()


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | BlockCodes,
    thresholds: jax.Array,
    *,
    instructions: str = "",
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``, M at most 4.

    ``instructions`` names one of :func:`pallas_kernels.native.instruction_sets`; empty for the
    best.
    """
    rows = x.astype(jnp.float32)
    result: Any = jax.ShapeDtypeStruct((x.shape[0], matrix_shape(weight)[1]), jnp.float32)
    if varying_axes(rows):  # ffi_call takes these from a whole type only
        result = jax.typeof(rows).update(shape=result.shape)
    static: dict[str, Any] = {"instructions": instructions}
    if isinstance(weight, BlockCodes):
        scales, scale_form = scale_operands(weight.scales)
        offsets, offset_form = scale_operands(weight.offsets)
        table = weight.lut.astype(jnp.float32)[..., 0]
        target, operands = SPARSE_PACKED, (weight.words, table, *scales, *offsets)
        static |= {"k": weight.k, "group_size": weight.group_size}
        static |= {"scale_form": scale_form, "offset_form": offset_form}
    else:
        target, operands = SPARSE_DENSE, (weight.reshape(matrix_shape(weight)),)
    call = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return call(rows, thresholds, *operands, **static).astype(x.dtype)
