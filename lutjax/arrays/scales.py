"""Group scales that are themselves quantised ("double quantisation")."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lutjax.arrays.split import Split
from lutjax.packing import BLOCK, pack
from pallas_kernels.scales import QuantizedScales


def split_scales(scales: Any, split: Split, k: Any) -> Any:
    """Partition specs of scales or offsets ``[*batch, Kg, N]``; ``k`` is what Kg is split by.

    Codes and steps of quantised ones that shards would cut through are replicated.
    """
    if not isinstance(scales, QuantizedScales):
        return None if scales is None else split.spec(k, split.n)
    groups, n = scales.shape[-2:]
    rows, columns = scales.block

    def fits(entry: Any, size: int, unit: int) -> Any:
        return entry if size % (split.shards(entry) * unit) == 0 else None

    return dataclasses.replace(
        scales,
        words=split.spec(fits(k, groups, BLOCK), None, split.n),
        steps=split.spec(fits(k, groups, rows), fits(split.n, n, columns)),
        floor=None if scales.floor is None else split.spec(None, None),
    )


@dataclasses.dataclass(frozen=True)
class DoubleQuant:
    """How to quantise scales: bits of a scale's code, block of a step, dtype of a step."""

    bits: int = 8
    block: int = 256
    dtype: str = "float32"

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"double quantisation with bits={self.bits}; use 1 to 8")
        if self.block < 1:
            raise ValueError(f"double quantisation with block={self.block}; use at least 1")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"step dtype {self.dtype!r}; use bfloat16, float16 or float32")


def quantize_scales(scales: Float[Array, "... g n"], config: DoubleQuant) -> QuantizedScales:
    """Quantises scales: ``round((s - o) (2**b0 - 1) / z)`` with o = min s and z = max over a block.

    Args:
      scales: ``float32[..., Kg, N]``; or offsets, of any sign.
      config: Bits, block and dtype.

    Returns:
      The quantised scales; where all scales of a block equal o, its step is zero.

    >>> scales = jnp.array([[1.0, 2.0, 4.0]])
    >>> quantize_scales(scales, DoubleQuant(bits=2)).expand().tolist()
    [[1.0, 2.0, 4.0]]
    """
    floor = scales.astype(jnp.float32).min(axis=(-2, -1), keepdims=True)
    return _rounded(scales, floor, config.bits, (1, config.block), 0, config.dtype)


def quantize_scales_like(scales: Float[Array, "... g n"], like: QuantizedScales) -> QuantizedScales:
    """Quantises scales in the form of others: bits, blocks, dtype, with or without a floor.

    >>> like = quantize_scales(jnp.ones((2, 4)), DoubleQuant(bits=2))
    >>> quantize_scales_like(jnp.array([[1.0, 2.0, 4.0]]), like).expand().tolist()
    [[1.0, 2.0, 4.0]]
    """
    scales = scales.astype(jnp.float32)
    floor = None if like.floor is None else scales.min(axis=(-2, -1), keepdims=True)
    return _rounded(scales, floor, like.bits, like.block, like.zero, like.steps.dtype)


def _rounded(
    scales: jax.Array,
    floor: jax.Array | None,
    bits: int,
    block: tuple[int, int],
    zero: int,
    dtype: Any,
) -> QuantizedScales:
    above = scales.astype(jnp.float32) - (0 if floor is None else floor)
    *batch, groups, n = above.shape
    rows, columns = block
    pad = -groups % rows, -n % columns
    padded = jnp.pad(above, [(0, 0)] * len(batch) + [(0, pad[0]), (0, pad[1])])
    tiled = padded.reshape(
        *batch, (groups + pad[0]) // rows, rows, (n + pad[1]) // columns, columns
    )
    top = 2**bits - 1
    # The largest scale gets the code that is furthest from zero; if it has the other sign, so do
    # all steps. Scales that have been of this form are found again.
    least, most = tiled.min(axis=(-3, -1)), tiled.max(axis=(-3, -1))
    largest = jnp.where(most >= -least, most, least)
    steps = (largest / (-zero if zero > top - zero else top - zero)).astype(dtype)
    step = steps.astype(jnp.float32)[..., :, None, :, None]
    codes = jnp.where(step != 0, jnp.round(tiled / jnp.where(step != 0, step, 1)), 0) + zero
    codes = jnp.clip(codes, 0, top).astype(jnp.uint8).reshape(padded.shape)[..., :groups, :n]
    return QuantizedScales(pack(codes, bits), steps, floor, -groups % BLOCK, block, zero)
