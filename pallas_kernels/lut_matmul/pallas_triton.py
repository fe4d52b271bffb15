"""The lookup-table product as a Pallas kernel through Triton: any NVIDIA GPU, any table.

It reads the canonical words: code ``i`` of all blocks is one matrix, multiplied by every eighth
row of ``x``. Entries come from the table through the first-level cache. jax announces the end of
Pallas' Triton lowering, so this file stands alone and is no dependency of the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.layout import BLOCK
from pallas_kernels.manual_axes import shape_struct


@contextlib.contextmanager
def _without_deprecation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


with _without_deprecation():
    from jax.experimental.pallas import triton as plt


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes (powers of two; ``block_k`` in blocks of eight codes) and Triton's own."""

    block_m: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


def supports(
    x: Any,
    words: Any,
    scales: Any,
    lut: Any,
    offsets: Any = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
) -> str | None:
    """None if the kernel can run here, else the reason why not."""
    del words, scales, lut, offsets, k, group_size, transpose
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"activations of {x.dtype}; use bfloat16, float16 or float32"
    if not platforms.interpreting() and platforms.device_kind("cuda") is None:
        return "no GPU is compiled for here"
    return None


def default_config(m: int, *, transpose: bool) -> Config:
    """Small tiles for few rows, square ones for many."""
    block_m = min(64, max(16, 1 << (m - 1).bit_length()))
    block_k = 16 if transpose else 32
    return Config(block_m, block_k, 64, 4, 3)


def lut_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    offsets: jax.Array | None = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``, or ``[M, N]`` when transposed."""
    config = config or default_config(x.shape[0], transpose=transpose)
    m, n = x.shape[0], words.shape[2]
    blocks, p = words.shape[0], lut.shape[2]
    padded_m = -(-m // config.block_m) * config.block_m
    padded_n = -(-n // config.block_n) * config.block_n
    padded_blocks = -(-blocks // config.block_k) * config.block_k
    words = jnp.pad(words, ((0, padded_blocks - blocks), (0, 0), (0, padded_n - n)))
    columns = ((0, 0), (0, padded_n - n))
    scales = jnp.pad(scales, columns)
    offsets = None if offsets is None else jnp.pad(offsets, columns)
    if lut.shape[0] > 1:
        lut = jnp.pad(lut, (columns[1], (0, 0), (0, 0)))
    x = jnp.pad(x, ((0, padded_m - m), (0, 0)))
    parts = BLOCK * p  # consecutive rows of W that come from one block
    if transpose:
        x = jnp.pad(x, columns)
        out_shape: tuple[int, ...] = (parts, padded_m, padded_blocks)
        grid = (padded_blocks // config.block_k, padded_m // config.block_m)
    else:
        x = jnp.pad(x, ((0, 0), (0, padded_blocks * parts - k)))
        x = x.reshape(padded_m, padded_blocks, parts).transpose(2, 0, 1)
        out_shape = (padded_m, padded_n)
        grid = (padded_n // config.block_n, padded_m // config.block_m)
    operands = [x, words, scales, lut.astype(jnp.float32)]
    if offsets is not None:
        operands.append(offsets)
    kernel = functools.partial(
        _transposed if transpose else _forward,
        config=config,
        group_size=group_size,
        rows=k,
        offsets=offsets is not None,
    )
    with _without_deprecation():
        y = pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=shape_struct(out_shape, x.dtype, x),
            interpret=interpret,
            compiler_params=plt.CompilerParams(
                num_warps=config.num_warps, num_stages=config.num_stages
            ),
            name="lut_matmul",
        )(*operands)
    if transpose:
        return y.transpose(1, 2, 0).reshape(padded_m, -1)[:m, :k]
    return y[:m, :n]


def _weight(
    refs: tuple, block: Any, column: Any, part: int, *, config: Config, group_size: int, rows: int
) -> jax.Array:
    """Rows ``parts * block + part`` of W for ``block_k`` blocks: ``float32[block_k, block_n]``."""
    words_ref, scales_ref, lut_ref, offsets_ref = refs
    bits, p = words_ref.shape[1], lut_ref.shape[2]
    index, value = divmod(part, p)
    columns = pl.ds(column, config.block_n)
    byte, shift = divmod(index * bits, 8)
    code = words_ref[pl.ds(block, config.block_k), byte, columns].astype(jnp.int32) >> shift
    if shift + bits > 8:
        high = words_ref[pl.ds(block, config.block_k), byte + 1, columns].astype(jnp.int32)
        code |= high << (8 - shift)
    code &= 2**bits - 1
    lane = column + lax.broadcasted_iota(jnp.int32, code.shape, 1)
    table = lane if lut_ref.shape[0] > 1 else jnp.zeros_like(code)
    weight = plt.load(lut_ref.at[table, code, value])
    row = (block + lax.broadcasted_iota(jnp.int32, code.shape, 0)) * (BLOCK * p) + part
    group = jnp.minimum(row, rows - 1) // group_size
    weight *= plt.load(scales_ref.at[group, lane]).astype(jnp.float32)
    if offsets_ref is not None:
        weight += plt.load(offsets_ref.at[group, lane]).astype(jnp.float32)
    return weight


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _split(refs: tuple, offsets: bool) -> tuple:
    *inputs, o_ref = refs
    return (*inputs, *([] if offsets else [None]), o_ref)


def _forward(x_ref, *refs, config: Config, group_size: int, rows: int, offsets: bool):
    *weight_refs, o_ref = _split(refs, offsets)
    column = pl.program_id(0) * config.block_n
    row_slice = pl.ds(pl.program_id(1) * config.block_m, config.block_m)

    def step(i, total):
        block = i * config.block_k
        for part in range(x_ref.shape[0]):
            weight = _weight(
                tuple(weight_refs),
                block,
                column,
                part,
                config=config,
                group_size=group_size,
                rows=rows,
            )
            x = x_ref[part, row_slice, pl.ds(block, config.block_k)]
            total += _dot(x, weight.astype(x.dtype))
        return total

    zero = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    total = lax.fori_loop(0, x_ref.shape[2] // config.block_k, step, zero)
    o_ref[row_slice, pl.ds(column, config.block_n)] = total.astype(o_ref.dtype)


def _transposed(x_ref, *refs, config: Config, group_size: int, rows: int, offsets: bool):
    *weight_refs, o_ref = _split(refs, offsets)
    block = pl.program_id(0) * config.block_k
    row_slice = pl.ds(pl.program_id(1) * config.block_m, config.block_m)
    for part in range(o_ref.shape[0]):

        def step(i, total, part=part):
            column = i * config.block_n
            weight = _weight(
                tuple(weight_refs),
                block,
                column,
                part,
                config=config,
                group_size=group_size,
                rows=rows,
            )
            x = x_ref[row_slice, pl.ds(column, config.block_n)]
            return total + _dot(x, weight.astype(x.dtype).T)

        zero = jnp.zeros((config.block_m, config.block_k), jnp.float32)
        total = lax.fori_loop(0, x_ref.shape[1] // config.block_n, step, zero)
        o_ref[part, row_slice, pl.ds(block, config.block_k)] = total.astype(o_ref.dtype)
