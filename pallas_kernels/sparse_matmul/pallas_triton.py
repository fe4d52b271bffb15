"""The sparse product as a Pallas kernel for GPUs (Triton): loads of dead rows are predicated off.

A program owns a range of columns and a range of K. It compares its activations with the threshold
and loads only the rows of its tile that some of them needs: a warp whose rows are dead issues no
memory transaction. Partial sums of the K ranges are added in a fixed order, so the result does not
change between runs (TEAL adds them with atomics).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.manual_axes import shape_struct
from pallas_kernels.sparse_matmul.blocks import ROWS_TOGETHER, BlockCodes
from pallas_kernels.sparse_matmul.checks import matrix_shape
from pallas_kernels.sparse_matmul.reference import keep
from pallas_kernels.sparse_matmul.rows import RowCodes, field_codes

MAX_ROWS = 8
_BLOCK_N = 128
_CHUNK = 256  # rows of a group that are summed before the scale is applied, at most


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes; ``block_n`` is for dense weights, the words of codes fix their own."""

    block_k: int
    k_parts: int
    block_n: int = _BLOCK_N
    num_warps: int = 4


def default_config(rows: int, columns: int, tile_columns: int) -> Config:
    """A sane configuration: enough programs and bytes in flight, sums that fit the registers."""
    programs = -(-columns // tile_columns)
    return Config(block_k=max(8, 32 // rows), k_parts=max(1, min(32, 1024 // programs)))


def supports(x: Any, weight: Any, thresholds: Any) -> str | None:
    """None if the kernel can run these shapes and dtypes, else the reason why not."""
    del thresholds
    if x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows of x; the kernel is for decoding, at most {MAX_ROWS}"
    if isinstance(weight, BlockCodes):
        return ROWS_TOGETHER
    if isinstance(weight, RowCodes):
        if weight.lut.shape[0] > 1:
            return "a table for each column"
        lanes = weight.words.shape[-1]
        if lanes not in (16, 32, 64, 128):
            return f"words of {lanes} lanes; pack_rows(..., lanes=32) fits this kernel"
        if weight.bits > 4:
            return f"{weight.bits}-bit codes; the kernel has 1 to 4"
    elif weight.ndim != 2:
        return f"a weight of shape {weight.shape}; the kernel takes [K, N]"
    return None


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | RowCodes,
    thresholds: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``."""
    (k, n), m = matrix_shape(weight), x.shape[0]
    columns = weight.fields * weight.words.shape[-1] if isinstance(weight, RowCodes) else _BLOCK_N
    config = config or default_config(1 << (m - 1).bit_length(), n, columns)
    kernel: Any
    operands: tuple[jax.Array, ...]
    tile_shape: tuple[int, ...]
    if isinstance(weight, RowCodes):
        _, tiles, lanes = weight.words.shape
        size = weight.group_size
        chunk = _CHUNK if size % _CHUNK == 0 else size
        kernel = functools.partial(
            _codes_kernel, k=k, chunk=chunk, group_size=size, fields=weight.fields, bits=weight.bits
        )
        padded = ((0, 0), (0, tiles * columns - n))
        scales = jnp.pad(weight.scales, padded).reshape(-1, tiles, weight.fields, lanes)
        operands = (weight.words, scales, weight.lut[0, :, 0].astype(jnp.float32))
        tile_shape = (weight.fields, lanes)
    else:
        columns, chunk = config.block_n, config.block_k
        tiles = -(-n // columns)
        kernel = functools.partial(_dense_kernel, k=k, n=n)
        operands = (weight,)
        tile_shape = (columns,)
    steps = -(-k // chunk)
    parts = min(config.k_parts, steps)
    steps_a_part = -(-steps // parts)
    y = pl.pallas_call(
        functools.partial(
            kernel,
            rows=m,
            steps=steps_a_part,
            block_k=config.block_k,
            row_thresholds=len(thresholds) > 1,
        ),
        grid=(tiles, parts),
        out_shape=shape_struct((parts, m, tiles, *tile_shape), jnp.float32, x),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps),
        interpret=interpret,
        name="sparse_matmul",
    )(x, thresholds, *operands)
    y = y.sum(axis=0).reshape(m, -1)[:, :n]
    if isinstance(weight, RowCodes):
        kept, size = keep(x, thresholds), weight.group_size
        y = add_offsets(y, kept, weight.offsets, k=k, group_size=size, transpose=False)
    return y.astype(x.dtype)


def _activations(x_ref, t_ref, start, limit, *, rows, block_k, row_thresholds):
    """The masked activations ``[block_k]`` of each row of x, and which rows of W any needs."""
    k = start + jnp.arange(block_k, dtype=jnp.int32)
    inside = k < limit
    threshold = plt.load(t_ref.at[k], mask=inside, other=0.0) if row_thresholds else t_ref[0]
    live = jnp.zeros((block_k,), jnp.bool_)
    values = []
    for row in range(rows):
        x = plt.load(x_ref.at[row, k], mask=inside, other=0.0).astype(jnp.float32)
        kept = inside & jnp.logical_not(jnp.abs(x) <= threshold)
        values.append(jnp.where(kept, x, 0.0))
        live = live | kept
    return k, live, values


def _dense_kernel(x_ref, t_ref, w_ref, o_ref, *, k, n, rows, steps, block_k, row_thresholds):
    tile, part = pl.program_id(0), pl.program_id(1)
    columns = o_ref.shape[-1]
    column = tile * columns + jnp.arange(columns, dtype=jnp.int32)

    def step(i, sums):
        start = (part * steps + i) * block_k
        ks, live, values = _activations(
            x_ref, t_ref, start, k, rows=rows, block_k=block_k, row_thresholds=row_thresholds
        )
        mask = live[:, None] & (column < n)[None, :]
        w = plt.load(w_ref.at[ks[:, None], column[None, :]], mask=mask, other=0.0)
        w = w.astype(jnp.float32)
        return tuple(s + x[:, None] * w for s, x in zip(sums, values, strict=True))

    zero = jnp.zeros((block_k, columns), jnp.float32)
    sums = lax.fori_loop(0, steps, step, (zero,) * rows)
    for row in range(rows):
        o_ref[part, row, tile, :] = jnp.sum(sums[row], axis=0)


def _codes_kernel(
    x_ref,
    t_ref,
    w_ref,
    s_ref,
    lut_ref,
    o_ref,
    *,
    k,
    chunk,
    group_size,
    fields,
    bits,
    rows,
    steps,
    block_k,
    row_thresholds,
):
    tile, part = pl.program_id(0), pl.program_id(1)
    lanes = w_ref.shape[-1]
    lane = jnp.arange(lanes, dtype=jnp.int32)
    groups = s_ref.shape[0]

    def one_chunk(i, totals):
        first = (part * steps + i) * chunk
        limit = jnp.minimum(first + chunk, k)

        def step(j, sums):
            ks, live, values = _activations(
                x_ref,
                t_ref,
                first + j * block_k,
                limit,
                rows=rows,
                block_k=block_k,
                row_thresholds=row_thresholds,
            )
            mask = jnp.broadcast_to(live[:, None], (block_k, lanes))
            words = plt.load(w_ref.at[ks[:, None], tile, lane[None, :]], mask=mask, other=0)
            out = list(sums)
            for field in range(fields):
                code = field_codes(words, bits, field).astype(jnp.int32)
                w = plt.load(lut_ref.at[code], mask=mask, other=0.0)
                for row in range(rows):
                    place = row * fields + field
                    out[place] = out[place] + values[row][:, None] * w
            return tuple(out)

        zero = jnp.zeros((block_k, lanes), jnp.float32)
        sums = lax.fori_loop(0, -(-chunk // block_k), step, (zero,) * (rows * fields))
        group = jnp.minimum(first // group_size, groups - 1)
        scales = [s_ref[group, tile, f, :].astype(jnp.float32) for f in range(fields)]
        return tuple(
            total + jnp.sum(s, axis=0) * scales[place % fields]
            for place, (total, s) in enumerate(zip(totals, sums, strict=True))
        )

    zero = jnp.zeros((lanes,), jnp.float32)
    totals = lax.fori_loop(0, steps, one_chunk, (zero,) * (rows * fields))
    for place, total in enumerate(totals):
        row, field = divmod(place, fields)
        o_ref[part, row, tile, field, :] = total
