"""The sparse product as a Pallas kernel for TPUs (Mosaic): copies live rows only.

The indices of the live rows are found beforehand and prefetched into scalar memory. The kernel
walks over them: while the rows of one step are multiplied, those of the next are copied from HBM,
each by a DMA of its own. That needs rows that are contiguous in tiled memory: a dense weight of
shape ``[K, N / 128, 128]``, or codes from :func:`pack_rows` with 128 lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.manual_axes import shape_struct
from pallas_kernels.sparse_matmul.blocks import ROWS_TOGETHER, BlockCodes
from pallas_kernels.sparse_matmul.checks import matrix_shape
from pallas_kernels.sparse_matmul.reference import keep
from pallas_kernels.sparse_matmul.rows import RowCodes

MAX_ROWS = 8
_LANES = 128
_SCALAR_BYTES = 512 * 1024  # of the scalar memory, for indices and activations
_VECTOR_BYTES = 12 * 1024 * 1024  # of the vector memory, for scales, buffers and sums


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows that are copied together."""

    step_rows: int = 8


def supports(x: Any, weight: Any, thresholds: Any) -> str | None:
    """None if the kernel can run these shapes and dtypes, else the reason why not."""
    del thresholds
    (k, n), m = matrix_shape(weight), x.shape[0]
    if m > MAX_ROWS:
        return f"{m} rows of x; the kernel is for decoding, at most {MAX_ROWS}"
    if isinstance(weight, BlockCodes):
        return ROWS_TOGETHER
    if 4 * k * (m + 1) > _SCALAR_BYTES:
        return f"K={k} with {m} rows of x does not fit the scalar memory"
    buffers, groups, sums = 2 * Config().step_rows, 0, m
    if isinstance(weight, RowCodes):
        if weight.words.shape[-1] != _LANES:
            return f"words of {weight.words.shape[-1]} lanes; use pack_rows(..., lanes={_LANES})"
        if weight.lut.shape[0] > 1 or weight.bits > 4:
            return f"{weight.lut.shape[0]} tables of {weight.bits}-bit codes; one of at most 4 bits"
        groups = weight.scales.shape[0]
    elif weight.ndim != 3 or weight.shape[2] != _LANES:
        return f"a weight of shape {weight.shape}; single rows need [K, N / {_LANES}, {_LANES}]"
    elif weight.dtype not in (jnp.bfloat16, jnp.float32):
        return f"a weight of {weight.dtype}; use bfloat16 or float32"
    if 4 * n * (buffers + groups + sums) > _VECTOR_BYTES:
        return f"N={n} with {groups} groups of scales does not fit the vector memory"
    return None


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | RowCodes,
    thresholds: jax.Array,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``."""
    config = config or Config()
    masked = keep(x, thresholds).astype(jnp.float32)
    (k, n), m, step = matrix_shape(weight), x.shape[0], config.step_rows
    alive = jnp.any(masked != 0, axis=0)
    (live,) = jnp.nonzero(alive, size=k + step, fill_value=k)
    count = jnp.sum(alive, dtype=jnp.int32)[None]
    # Behind the last live row the loop copies row 0 and multiplies it by zero.
    factors = jnp.pad(masked, ((0, 0), (0, 1)))[:, live]
    live = jnp.where(live == k, 0, live).astype(jnp.int32)
    kernel: Any
    if isinstance(weight, RowCodes):
        rows, fields = weight.words, weight.fields
        padding = rows.shape[1] * fields * _LANES - n
        scales = jnp.pad(weight.scales.astype(jnp.float32), ((0, 0), (0, padding)))
        scales = scales.reshape(-1, rows.shape[1], fields, _LANES).swapaxes(1, 2)
        operands = [weight.lut[0, :, 0].astype(jnp.float32), scales]
        specs = [
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.VMEM),
        ]
        kernel = functools.partial(_codes_kernel, bits=weight.bits, group_size=weight.group_size)
    else:
        rows, fields = weight, 1
        operands, specs = [], []
        kernel = _dense_kernel
    _, blocks, lanes = rows.shape
    # Else XLA moves the whole weight to vector memory where it fits.
    rows = pltpu.with_memory_space_constraint(rows, pltpu.HBM)
    y = pl.pallas_call(
        functools.partial(_walk, kernel=kernel, step=step, m=m),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *specs,
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            scratch_shapes=[
                pltpu.VMEM((2, step, blocks, lanes), rows.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=shape_struct((m, fields, blocks, lanes), jnp.float32, x),
        interpret=interpret,
        name="sparse_matmul",
    )(live, count, factors, *operands, rows)
    y = y.swapaxes(1, 2).reshape(m, -1)[:, :n]
    if isinstance(weight, RowCodes):
        size = weight.group_size
        y = add_offsets(y, masked, weight.offsets, k=k, group_size=size, transpose=False)
    return y.astype(x.dtype)


def _walk(live_ref, count_ref, factor_ref, *refs, kernel, step, m):
    """Copies the live rows, ``step`` at a time and one step ahead of the products."""
    *extra, rows_ref, o_ref, buffer_ref, semaphores = refs
    # lax.div: floor division asks for signs, which Mosaic lowers only with a known device.
    steps = lax.div(count_ref[0] + (step - 1), step)

    def copy(index, slot, i):
        row = live_ref[index * step + i]
        return pltpu.make_async_copy(rows_ref.at[row], buffer_ref.at[slot, i], semaphores.at[slot])

    def start(index, slot):
        for i in range(step):
            copy(index, slot, i).start()

    @pl.when(steps > 0)
    def start_first():
        start(0, 0)

    o_ref[...] = jnp.zeros_like(o_ref)

    def body(index, carry):
        slot = lax.rem(index, 2)

        @pl.when(index + 1 < steps)
        def start_next():
            start(index + 1, 1 - slot)

        for i in range(step):
            copy(index, slot, i).wait()
        for i in range(step):
            place = index * step + i
            factors = [factor_ref[row, place] for row in range(m)]
            kernel(live_ref[place], buffer_ref[slot, i], factors, o_ref, *extra)
        return carry

    lax.fori_loop(0, steps, body, None)


def _dense_kernel(k, row, factors, o_ref):
    del k
    row = row.astype(jnp.float32)
    for m, factor in enumerate(factors):
        o_ref[m, 0] += factor * row


def _codes_kernel(k, words, factors, o_ref, lut_ref, scale_ref, *, bits, group_size):
    group = lax.div(k, group_size)
    words = lax.bitcast_convert_type(words, jnp.int32)  # of all rows at once, XLA would copy them
    for field in range(o_ref.shape[1]):
        codes = (lax.shift_right_logical(words, field * bits)) & (2**bits - 1)
        weight = _select(lut_ref, codes, bits) * scale_ref[group, field]
        for m, factor in enumerate(factors):
            o_ref[m, field] += factor * weight


def _select(lut_ref, codes, bits):
    """``lut[codes]`` as a tree of selects over the bits of the codes."""
    values = [jnp.full(codes.shape, lut_ref[i]) for i in range(2**bits)]
    for bit in range(bits):
        odd = (codes & (1 << bit)) != 0
        values = [jnp.where(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]
