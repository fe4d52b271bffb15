"""GGUF's block types that are codes of a table with scales.

Format: `dequantize_row_*` in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from lutjax.io.blocks import (
    CodedScales,
    GridBlocks,
    GridSpec,
    ScaleForm,
    float8_values,
    powers_of_two,
)


class _Coded(NamedTuple):
    """Quantised scales or offsets of blocks: uint8 `[blocks, groups]` and steps `[blocks, 1]`."""

    codes: UInt8[np.ndarray, "blocks groups"]
    steps: Float[np.ndarray, "blocks 1"]


class _Unpacked(NamedTuple):
    """Blocks of one type, taken apart.

    Attributes:
      codes: uint8 `[blocks, values]`.
      scales: `[blocks, groups]`, of a float dtype, or quantised.
      offsets: the same, or None.
    """

    codes: UInt8[np.ndarray, "blocks values"]
    scales: Float[np.ndarray, "blocks groups"] | _Coded
    offsets: Float[np.ndarray, "blocks groups"] | _Coded | None = None


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How the blocks of one type are stored, and how they are kept.

    Attributes:
      levels: the value of each code.
      group_size: values that share a scale.
      scales: the dtype in which scales and offsets are exact, or how they are quantised.
      has_offsets: whether there are offsets.
      unpack: takes blocks uint8 `[blocks, bytes]` apart.
    """

    levels: tuple[int, ...]
    group_size: int
    scales: type[np.generic] | ScaleForm
    has_offsets: bool
    unpack: Callable[[np.ndarray], _Unpacked]

    def spec(self, shape: tuple[int, ...]) -> GridSpec:
        """What is known of a weight of this type before it is read."""
        scales = self.scales if isinstance(self.scales, ScaleForm) else np.dtype(self.scales)
        bits = len(self.levels).bit_length() - 1
        return GridSpec(shape, bits, self.group_size, scales, scales if self.has_offsets else None)

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

        def rows(values: np.ndarray) -> np.ndarray:
            return values.reshape(*shape[:-1], -1)

        def kept(values: Any) -> Any:
            if isinstance(self.scales, ScaleForm):
                steps = rows(values.steps).astype(self.scales.dtype)
                return CodedScales(rows(values.codes), steps, self.scales)
            return None if values is None else rows(values).astype(self.scales)

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
    packed, step, floor = blocks[:, :16], _float16(blocks[:, 80:82]), _float16(blocks[:, 82:84])
    codes = _runs(blocks[:, 16:80], 2, 32)
    return _Unpacked(codes, _Coded(packed & 15, step), _Coded(packed >> 4, -floor))


def _q3_k(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, 32:96], 2, 32) | _runs(blocks[:, :32], 1, 32) << 2
    scales = _runs(blocks[:, 96:104], 4, 8) | _runs(blocks[:, 104:108], 2, 4) << 4
    return _Unpacked(codes, _Coded(scales, _float16(blocks[:, 108:])))


def _q4_k(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, 16:], 4, 32), *_k_scales(blocks))


def _q5_k(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, 48:], 4, 32) | _runs(blocks[:, 16:48], 1, 32) << 4
    return _Unpacked(codes, *_k_scales(blocks))


def _q6_k(blocks: np.ndarray) -> _Unpacked:
    codes = _runs(blocks[:, :128], 4, 64) | _runs(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208] + np.uint8(128)  # two's complement, as in Q8_0
    return _Unpacked(codes, _Coded(scales, _float16(blocks[:, 208:])))


def _iq4_xs(blocks: np.ndarray) -> _Unpacked:
    scales = _runs(blocks[:, 4:8], 4, 1) | _runs(blocks[:, 2:4], 2, 1) << 4
    return _Unpacked(_runs(blocks[:, 8:], 4, 16), _Coded(scales, _float16(blocks[:, :2])))


def _mxfp4(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, 1:], 4, 16), powers_of_two(blocks[:, :1], 128))


def _nvfp4(blocks: np.ndarray) -> _Unpacked:
    # Without a sign; halved, as the levels are doubled. Where all bits are set, theirs is zero.
    scales = float8_values()[blocks[:, :4] & 127] * np.float32(0.5)
    return _Unpacked(_runs(blocks[:, 4:], 4, 8), np.where(blocks[:, :4] == 127, 0, scales))


def _tq1_0(blocks: np.ndarray) -> _Unpacked:
    runs = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    codes = np.concatenate([_trits(data, count) for data, count in runs], axis=1)
    return _Unpacked(codes, _float16(blocks[:, 52:]))


def _tq2_0(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, :64], 2, 32), _float16(blocks[:, 64:]))


def _q1_0(blocks: np.ndarray) -> _Unpacked:
    return _Unpacked(_runs(blocks[:, 2:], 1, 1), _float16(blocks[:, :2]))


def _trits(data: np.ndarray, count: int) -> np.ndarray:
    """Unpacks `[blocks, bytes]`: of all bytes first the highest digit to base three, then the next.

    A byte is a fraction of 256, of which a product with three has the next digit above the point.
    """
    powers = 3 ** np.arange(count, dtype=np.uint8)[:, None]
    fractions = data[:, None, :] * powers  # of 8 bits: what is above the point is dropped
    return (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def _k_scales(blocks: np.ndarray) -> tuple[_Coded, _Coded]:
    """Scales and offsets `[blocks, 8]` of Q4_K and Q5_K: two float16 times 6-bit integers each."""
    scales, floors, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scales & 63, high & 15 | scales >> 2 & 48], axis=1)
    floors = np.concatenate([floors & 63, high >> 4 | floors >> 2 & 48], axis=1)
    return _Coded(scales, _float16(blocks[:, :2])), _Coded(floors, -_float16(blocks[:, 2:4]))


def _runs(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Unpacks `[blocks, bytes]`: of each `width` bytes first the lowest bits, then the next."""
    if bits == width == 1:  # many times as fast
        return np.unpackbits(data, axis=1, bitorder="little")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return runs.reshape(len(data), -1)


def _float16(data: np.ndarray) -> np.ndarray:
    """The float16 in the two bytes of each block, as float32 `[blocks, 1]`."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Of E2M1, doubled: its scales are half of what their exponents say.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_TERNARY = (-1, 0, 1, 2)  # the last one is not used

_HALF = np.dtype(np.float16)

BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(tuple(range(-8, 8)), 32, np.float16, False, _q4_0),
    "Q4_1": BlockType(tuple(range(16)), 32, np.float16, True, _q4_1),
    "Q5_0": BlockType(tuple(range(-16, 16)), 32, np.float16, False, _q5_0),
    "Q5_1": BlockType(tuple(range(32)), 32, np.float16, True, _q5_1),
    "Q8_0": BlockType(tuple(range(-128, 128)), 32, np.float16, False, _q8_0),
    "Q2_K": BlockType(tuple(range(4)), 16, ScaleForm(4, 16, 0, _HALF), True, _q2_k),
    "Q3_K": BlockType(tuple(range(-4, 4)), 16, ScaleForm(6, 16, 32, _HALF), False, _q3_k),
    "Q4_K": BlockType(tuple(range(16)), 32, ScaleForm(6, 8, 0, _HALF), True, _q4_k),
    "Q5_K": BlockType(tuple(range(32)), 32, ScaleForm(6, 8, 0, _HALF), True, _q5_k),
    "Q6_K": BlockType(tuple(range(-32, 32)), 16, ScaleForm(8, 16, 128, _HALF), False, _q6_k),
    "IQ4_NL": BlockType(_IQ4, 32, np.float16, False, _q4_0),
    "MXFP4": BlockType(_E2M1, 32, ml_dtypes.bfloat16, False, _mxfp4),
    "IQ4_XS": BlockType(_IQ4, 32, ScaleForm(6, 8, 32, _HALF), False, _iq4_xs),
    "NVFP4": BlockType(_E2M1, 16, ml_dtypes.bfloat16, False, _nvfp4),
    "TQ1_0": BlockType(_TERNARY, 256, np.float16, False, _tq1_0),
    "TQ2_0": BlockType(_TERNARY, 256, np.float16, False, _tq2_0),
    "Q1_0": BlockType((-1, 1), 128, np.float16, False, _q1_0),
}
"""The types that are kept exactly, in the bits that they take in the file.

Three take more: the scales of MXFP4 and NVFP4, which have 8 bits, are kept in bfloat16, and the
codes of TQ1_0, five of which are in a byte, in two bits.
"""
