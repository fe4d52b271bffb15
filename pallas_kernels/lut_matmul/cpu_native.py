"""``lut_matmul`` in C++ for CPUs, called through XLA's foreign function interface.

A few rows of activations: the table stays in registers (``vpermps`` on AVX-512 and AVX2, ``tbl`` on
NEON) and codes are looked up as they stream by. More rows: a cache-sized panel of the weight is
dequantised once and multiplied with all of them. Columns are split over XLA's own threads, so the
result does not depend on their number. The instruction set is chosen when the call runs.

A table of vectors is p tables of single values: the product is the sum of p products, of every
p-th row of the weight each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import BLOCK
from pallas_kernels.manual_axes import varying_axes
from pallas_kernels.native import LUT_MATMUL, availability
from pallas_kernels.scales import QuantizedScales

_SCALE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def supports(
    x: Any,
    words: Any,
    scales: Any,
    lut: Any,
    offsets: Any,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
) -> str | None:
    """None if the product can run, else the reason why not."""
    p = lut.shape[-1]
    if group_size % (BLOCK * p) and group_size < k:
        return f"group_size={group_size} is not a multiple of {BLOCK * p}"
    return availability()


def scale_operands(
    scales: jax.Array | QuantizedScales | None,
) -> tuple[tuple[jax.Array, ...], np.ndarray]:
    """Scales, or offsets, as the kernels read them: values, words, floor; and the static form.

    Empty arrays stand for what there is not.
    """
    words, floor = jnp.zeros((0, 0, 0), jnp.uint8), jnp.zeros((0,), jnp.float32)
    form = np.zeros(3, np.int64)
    if isinstance(scales, QuantizedScales):
        values, words = scales.steps, scales.words
        floor = floor if scales.floor is None else scales.floor.reshape(1)
        form = np.array([*scales.block, scales.zero], np.int64)
    else:
        values = jnp.zeros((0, 0), jnp.float32) if scales is None else scales
    if values.dtype not in _SCALE_DTYPES:
        values = values.astype(jnp.float32)
    return (values, words, floor), form


def lut_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array | QuantizedScales,
    lut: jax.Array,
    offsets: jax.Array | QuantizedScales | None = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
    instructions: str = "",
) -> jax.Array:
    """``x @ W`` or ``x @ W.T``; arguments and meaning as in the reference.

    The weight stays in float32 where the reference rounds it to ``x.dtype``. ``instructions``
    names one of :func:`pallas_kernels.native.instruction_sets`; empty for the best.
    """
    reason = availability()
    if reason is not None:
        raise NotImplementedError(f"implementation 'cpu_native' cannot run: {reason}")
    blocks, _, n = words.shape
    p = lut.shape[2]
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if not transpose and blocks * BLOCK * p != k:
        rows = jnp.pad(rows, [(0, 0), (0, blocks * BLOCK * p - k)])
    scale_arrays, scale_form = scale_operands(scales)
    offset_arrays, offset_form = scale_operands(offsets)
    codes = -(-k // p)
    result: Any = jax.ShapeDtypeStruct((rows.shape[0], codes if transpose else n), jnp.float32)
    if varying_axes(rows):  # ffi_call takes these from a whole type only
        result = jax.typeof(rows).update(shape=result.shape)
    call = jax.ffi.ffi_call(LUT_MATMUL, result, vmap_method="sequential")
    products = [
        call(
            rows if transpose else rows[:, i::p],
            words,
            lut[:, :, i].astype(jnp.float32),
            *scale_arrays,
            *offset_arrays,
            k=codes,
            group_size=blocks * BLOCK if group_size >= k else group_size // p,
            transpose=transpose,
            instructions=instructions,
            scale_form=scale_form,
            offset_form=offset_form,
        )
        for i in range(p)
    ]
    if transpose:
        y = jnp.stack(products, axis=-1).reshape(rows.shape[0], -1)[:, :k]
    else:
        y = sum(products[1:], start=products[0])
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
