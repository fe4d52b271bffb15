"""Group scales that are themselves quantised ("double quantisation")."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lutjax.arrays.split import Split
from lutjax.packing import BLOCK, pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedScales:
    """Scales ``[..., Kg, N]`` as small integers above the matrix's smallest scale.

    ``scale = floor + code * step`` with one step for each ``block`` neighbouring columns of a group
    row. Storage for a group of B0 weights: ``b0 / B0 + b1 / (B0 * B1)`` bits a weight beside the
    codes, b0 the bits of a scale's code, B1 the block and b1 the bits of a step.

    Attributes:
      words: ``uint8[..., ceil(N / 8), b0, Kg]``, the packed scale codes, N first.
      steps: ``[..., Kg, ceil(N / B1)]`` in bfloat16, float16 or float32.
      floor: ``float32[..., 1, 1]``, the smallest scale of the matrix.
      padding: Codes that pad N to a multiple of eight.
      block: B1.

    Source: LQ-LoRA (arXiv 2311.12023, section 3.1), after QLoRA (arXiv 2305.14314, section 3).
    """

    words: UInt8[Array, "..."]
    steps: Float[Array, "..."]
    floor: Float[Array, "..."]
    padding: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scales that these stand for, ``[..., Kg, N]``."""
        *batch, blocks, _, groups = self.words.shape
        return (*batch, groups, 8 * blocks - self.padding)

    @property
    def bits(self) -> int:
        """Bits b0 of a scale's code."""
        return self.words.shape[-2]

    def expand(self) -> Float[Array, "..."]:
        """The scales as ``float32[..., Kg, N]``."""
        n = self.shape[-1]
        if self.steps.shape[-1] != -(-n // self.block):  # a shard of N that cuts through blocks
            raise ValueError(
                f"quantised scales {self.shape} with blocks of {self.block} columns have "
                f"{self.steps.shape[-1]} steps a row; inside shard_map, shards of N must be whole "
                f"blocks"
            )
        codes = jnp.swapaxes(unpack(self.words, n), -1, -2)
        steps = jnp.repeat(self.steps.astype(jnp.float32), self.block, axis=-1)[..., :n]
        return self.floor + codes.astype(jnp.float32) * steps

    def split_specs(self, split: Split, k: Any) -> Any:
        """Partition specs of the fields; ``k`` is what the groups are split by."""
        n, shards = self.shape[-1], split.shards(split.n)
        words_fit = n % (shards * BLOCK) == 0
        steps_fit = n % (shards * self.block) == 0
        return dataclasses.replace(
            self,
            words=split.spec(split.n if words_fit else None, None, k),
            steps=split.spec(k, split.n if steps_fit else None),
            floor=split.spec(None, None),
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
      scales: ``float32[..., Kg, N]``, not negative.
      config: Bits, block and dtype.

    Returns:
      The quantised scales; where all scales of a block equal o, its step is zero.

    >>> scales = jnp.array([[1.0, 2.0, 4.0]])
    >>> quantize_scales(scales, DoubleQuant(bits=2)).expand().tolist()
    [[1.0, 2.0, 4.0]]
    """
    scales = scales.astype(jnp.float32)
    n = scales.shape[-1]
    floor = scales.min(axis=(-2, -1), keepdims=True)
    above = scales - floor
    blocks = math.ceil(n / config.block)
    padded = jnp.pad(above, [(0, 0)] * (above.ndim - 1) + [(0, blocks * config.block - n)])
    largest = padded.reshape(*padded.shape[:-1], blocks, config.block).max(axis=-1)
    top = 2**config.bits - 1
    steps = (largest / top).astype(config.dtype)
    step = jnp.repeat(steps.astype(jnp.float32), config.block, axis=-1)[..., :n]
    codes = jnp.where(step > 0, jnp.round(above / jnp.where(step > 0, step, 1)), 0)
    codes = jnp.clip(codes, 0, top).astype(jnp.uint8)
    words = pack(jnp.swapaxes(codes, -1, -2), config.bits)
    return QuantizedScales(words, steps, floor, padding=-n % 8, block=config.block)
