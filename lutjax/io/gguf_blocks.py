"""GGUF's block types that are codes of a table with scales.

Format: `dequantize_row_*` in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from lutjax.io.blocks import GridBlocks, GridSpec


class _Unpacked(NamedTuple):
    """Blocks of one type, taken apart.

    Attributes:
      codes: uint8 `[blocks, values]`.
      scales: float32 `[blocks, groups]`.
      offsets: the same, or None.
    """

    codes: UInt8[np.ndarray, "blocks values"]
    scales: Float32[np.ndarray, "blocks groups"]
    offsets: Float32[np.ndarray, "blocks groups"] | None = None


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How the blocks of one type are stored, and how they are kept.

    Attributes:
      levels: the value of each code.
      group_size: values that share a scale.
      scale_dtype: the dtype in which scales and offsets are exact.
      has_offsets: whether there are offsets.
      unpack: takes blocks uint8 `[blocks, bytes]` apart.
    """

    levels: tuple[int, ...]
    group_size: int
    scale_dtype: type[np.floating]
    has_offsets: bool
    unpack: Callable[[np.ndarray], _Unpacked]

    def spec(self, shape: tuple[int, int]) -> GridSpec:
        """What is known of a matrix of this type before it is read."""
        dtype = np.dtype(self.scale_dtype)
        bits = len(self.levels).bit_length() - 1
        return GridSpec(shape, bits, self.group_size, dtype, dtype if self.has_offsets else None)

    def blocks(self, data: np.ndarray, shape: tuple[int, int], block_bytes: int) -> GridBlocks:
        """Takes a matrix apart.

        Args:
          data: uint8 `[bytes]`.
          shape: `(out, in)`.
          block_bytes: bytes of a block.

        Returns:
          The matrix; `dense()` is bit for bit what dequantising it gives.
        """
        codes, scales, offsets = self.unpack(data.reshape(-1, block_bytes))

        def kept(values: np.ndarray) -> np.ndarray:
            return values.reshape(shape[0], -1).astype(self.scale_dtype)

        return GridBlocks(
            codes=codes.reshape(shape),
            levels=np.array(self.levels, np.float32),
            scales=kept(scales),
            offsets=None if offsets is None else kept(offsets),
            group_size=self.group_size,
        )


def _q4_0(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, 2:], 4, 16), _float16(blocks[:, :2]))


def _q4_1(blocks: np.ndarray) -> _Unpacked:
    scales, offsets = _float16(blocks[:, :2]), _float16(blocks[:, 2:4])
    return _Unpacked(_runs(blocks[:, 4:], 4, 16), scales, offsets)


def _q8_0(blocks: np.ndarray) -> _Unpacked:
    codes = blocks[:, 2:] + np.uint8(128)  # two's complement to 0 … 255, by wrapping
    return _Unpacked(codes, _float16(blocks[:, :2]))


def _runs(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Unpacks `[blocks, bytes]`: of each `width` bytes first the lowest bits, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return runs.reshape(len(data), -1)


def _float16(data: np.ndarray) -> np.ndarray:
    """The float16 in the two bytes of each block, as float32 `[blocks, 1]`."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(tuple(range(-8, 8)), 32, np.float16, False, _q4_0),
    "Q4_1": BlockType(tuple(range(16)), 32, np.float16, True, _q4_1),
    "Q8_0": BlockType(tuple(range(-128, 128)), 32, np.float16, False, _q8_0),
}
"""The types that are kept exactly."""
