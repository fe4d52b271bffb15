"""GGUF's block types that are codes of a table with scales.

Format: `dequantize_row_*` in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from lutjax.io.blocks import GridBlocks, GridSpec, powers_of_two


class _Unpacked(NamedTuple):
    """Blocks of one type, taken apart.

    Attributes:
      codes: uint8 `[blocks, values]`.
      scales: `[blocks, groups]`, of a float dtype.
      offsets: the same, or None.
    """

    codes: UInt8[np.ndarray, "blocks values"]
    scales: Float[np.ndarray, "blocks groups"]
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
    scale_dtype: type[np.generic]
    has_offsets: bool
    unpack: Callable[[np.ndarray], _Unpacked]

    def spec(self, shape: tuple[int, ...]) -> GridSpec:
        """What is known of a weight of this type before it is read."""
        dtype = np.dtype(self.scale_dtype)
        bits = len(self.levels).bit_length() - 1
        return GridSpec(shape, bits, self.group_size, dtype, dtype if self.has_offsets else None)

    def blocks(self, data: np.ndarray, shape: tuple[int, ...], block_bytes: int) -> GridBlocks:
        """Takes a weight apart.

        Args:
          data: uint8 `[bytes]`.
          shape: `(*experts, out, in)`.
          block_bytes: bytes of a block.

        Returns:
          The weight; `dense()` is bit for bit what dequantising it gives.
        """
        codes, scales, offsets = self.unpack(data.reshape(-1, block_bytes))

        def kept(values: np.ndarray) -> np.ndarray:
            return values.reshape(*shape[:-1], -1).astype(self.scale_dtype)

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


def _q5_0(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, 6:], 4, 16) | _runs(blocks[:, 2:6], 1, 1) << 4
    return _Unpacked(codes, _float16(blocks[:, :2]))


def _q5_1(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, 8:], 4, 16) | _runs(blocks[:, 4:8], 1, 1) << 4
    return _Unpacked(codes, _float16(blocks[:, :2]), _float16(blocks[:, 2:4]))


def _q8_0(blocks: np.ndarray) -> _Unpacked:
    codes = blocks[:, 2:] + np.uint8(128)  # two's complement to 0 … 255, by wrapping
    return _Unpacked(codes, _float16(blocks[:, :2]))


def _q2_k(blocks: np.ndarray) -> _Unpacked:
    packed, d, floor = blocks[:, :16], _float16(blocks[:, 80:82]), _float16(blocks[:, 82:84])
    return _Unpacked(_runs(blocks[:, 16:80], 2, 32), d * (packed & 15), -(floor * (packed >> 4)))


def _q3_k(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, 32:96], 2, 32) | _runs(blocks[:, :32], 1, 32) << 2
    scales = _runs(blocks[:, 96:104], 4, 8) | _runs(blocks[:, 104:108], 2, 4) << 4
    return _Unpacked(codes, _float16(blocks[:, 108:]) * (scales.astype(np.float32) - 32))


def _q4_k(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, 16:], 4, 32), *_k_scales(blocks))


def _q5_k(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, 48:], 4, 32) | _runs(blocks[:, 16:48], 1, 32) << 4
    return _Unpacked(codes, *_k_scales(blocks))


def _q6_k(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, :128], 4, 64) | _runs(blocks[:, 128:192], 2, 32) << 4
    return _Unpacked(codes, _float16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8))


def _iq4_xs(blocks: np.ndarray) -> _Unpacked:
    scales = _runs(blocks[:, 4:8], 4, 1) | _runs(blocks[:, 2:4], 2, 1) << 4
    scales = _float16(blocks[:, :2]) * (scales.astype(np.float32) - 32)
    return _Unpacked(_runs(blocks[:, 8:], 4, 16), scales)


def _mxfp4(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, 1:], 4, 16), powers_of_two(blocks[:, :1], 128))


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets `[blocks, 8]` of Q4_K and Q5_K: two float16 times 6-bit integers each."""
    scales, floors, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scales & 63, high & 15 | scales >> 2 & 48], axis=1)
    floors = np.concatenate([floors & 63, high >> 4 | floors >> 2 & 48], axis=1)
    return _float16(blocks[:, :2]) * scales, -(_float16(blocks[:, 2:4]) * floors)


def _runs(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Unpacks `[blocks, bytes]`: of each `width` bytes first the lowest bits, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return runs.reshape(len(data), -1)


def _float16(data: np.ndarray) -> np.ndarray:
    """The float16 in the two bytes of each block, as float32 `[blocks, 1]`."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Of E2M1, doubled: its scales are half of what their exponents say.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(tuple(range(-8, 8)), 32, np.float16, False, _q4_0),
    "Q4_1": BlockType(tuple(range(16)), 32, np.float16, True, _q4_1),
    "Q5_0": BlockType(tuple(range(-16, 16)), 32, np.float16, False, _q5_0),
    "Q5_1": BlockType(tuple(range(32)), 32, np.float16, True, _q5_1),
    "Q8_0": BlockType(tuple(range(-128, 128)), 32, np.float16, False, _q8_0),
    "Q2_K": BlockType(tuple(range(4)), 16, np.float32, True, _q2_k),
    "Q3_K": BlockType(tuple(range(-4, 4)), 16, np.float32, False, _q3_k),
    "Q4_K": BlockType(tuple(range(16)), 32, np.float32, True, _q4_k),
    "Q5_K": BlockType(tuple(range(32)), 32, np.float32, True, _q5_k),
    "Q6_K": BlockType(tuple(range(-32, 32)), 16, np.float32, False, _q6_k),
    "IQ4_NL": BlockType(_IQ4, 32, np.float16, False, _q4_0),
    "MXFP4": BlockType(_E2M1, 32, ml_dtypes.bfloat16, False, _mxfp4),
    "IQ4_XS": BlockType(_IQ4, 32, np.float32, False, _iq4_xs),
}
"""The types that are kept exactly.

A group's scale of the K types and of IQ4_XS is a float16 times an integer of 6 or 8 bits, which
float16 cannot hold. They are kept in float32, which takes more than the file: bits a weight in the
file → kept are 2.625 → 6 for Q2_K, 3.4375 → 5 for Q3_K, 4.5 → 6 for Q4_K, 5.5 → 7 for Q5_K,
6.5625 → 8 for Q6_K and 4.25 → 5 for IQ4_XS. MXFP4's are powers of two, which are kept in bfloat16:
4.25 → 4.5. The others take what they take in the file.
"""
