"""Matrices as codes of a table with a scale for each group: what quantised checkpoints hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8


@dataclasses.dataclass(frozen=True)
class ScaleForm:
    """How scales are quantised themselves: (code - zero) · step.

    Attributes:
      bits: bits of a scale's code.
      block: neighbouring groups of a row that share a step.
      zero: the code that stands for zero.
      dtype: dtype of the steps.
    """

    bits: int
    block: int
    zero: int
    dtype: np.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedScales:
    """Scales or offsets that are quantised themselves.

    Attributes:
      codes: uint8 `[*experts, out, groups]`.
      steps: `[*experts, out, blocks]` in the dtype of the form.
      form: what they mean.
    """

    codes: UInt8[np.ndarray, "*experts out groups"]
    steps: Float[np.ndarray, "*experts out blocks"]
    form: ScaleForm = dataclasses.field(metadata={"static": True})

    def values(self) -> Float32[np.ndarray, "*experts out groups"]:
        """The scales, which are exact in float32 if steps are of float16 or bfloat16."""
        steps = np.repeat(self.steps.astype(np.float32), self.form.block, axis=-1)
        codes = self.codes.astype(np.float32) - np.float32(self.form.zero)
        return codes * steps[..., : self.codes.shape[-1]]


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """What a file's headers say of a quantised matrix, or of those of a block's experts.

    Attributes:
      shape: `(*experts, out, in)`.
      bits: bits of a code.
      group_size: neighbouring codes of a row that share a scale.
      scales: dtype of the scales, or how they are quantised.
      offsets: the same of the offsets, or None if there are none.
      reordered: whether columns are sorted into groups, in an order that is part of the data.
    """

    shape: tuple[int, ...]
    bits: int
    group_size: int
    scales: np.dtype | ScaleForm
    offsets: np.dtype | ScaleForm | None
    reordered: bool = False


@dataclasses.dataclass(frozen=True)
class GridBlocks:
    """A matrix as levels[codes] · scales (+ offsets), computed in float32.

    The matrices of a block's experts are one too, with a leading axis.

    Attributes:
      codes: uint8 `[*experts, out, in]`.
      levels: float32 `[2 ** bits]`, the value of each code, or `[*experts, 2 ** bits]`.
      scales: `[*experts, out, groups]` in the dtype they are kept in, or quantised.
      offsets: the same, or None.
      group_size: neighbouring codes of a row that share a scale; the last group may be shorter.
      columns: `[*experts, in]`, which column of the matrix each column of codes is; None if it is
        the same.
    """

    codes: UInt8[np.ndarray, "*experts out in"]
    levels: Float32[np.ndarray, "*experts levels"]
    scales: Float[np.ndarray, "*experts out groups"] | CodedScales
    offsets: Float[np.ndarray, "*experts out groups"] | CodedScales | None
    group_size: int
    columns: Integer[np.ndarray, "*experts in"] | None = None

    @classmethod
    def stack(cls, grids: Sequence[GridBlocks]) -> GridBlocks:
        """The matrices of several experts, which are quantised alike, as one."""
        first = grids[0]

        def stacked(field: str) -> Any:
            fields = [getattr(grid, field) for grid in grids]
            return jax.tree.map(lambda *arrays: np.stack(arrays), *fields)

        columns = None
        if any(grid.columns is not None for grid in grids):
            same = np.arange(first.codes.shape[1])
            columns = np.stack([same if g.columns is None else g.columns for g in grids])
        return cls(
            stacked("codes"),
            stacked("levels"),
            stacked("scales"),
            stacked("offsets"),
            first.group_size,
            columns,
        )

    def rows(self, order: np.ndarray) -> GridBlocks:
        """The same matrix with its rows in another order; there must be no axis of experts."""
        parts = self.codes, self.scales, self.offsets
        codes, scales, offsets = jax.tree.map(lambda a: a[order], parts)
        return dataclasses.replace(self, codes=codes, scales=scales, offsets=offsets)

    def dense(self) -> Float32[np.ndarray, "*experts out in"]:
        """The matrix in float32, one rounding after the product and one after the sum."""
        with np.errstate(invalid="ignore"):  # whoever asks for finite values looks at the result
            values = self._looked_up() * self._repeated(self.scales)
            if self.offsets is not None:
                values += self._repeated(self.offsets)
        if self.columns is None:
            return values
        matrix = np.empty_like(values)
        np.put_along_axis(matrix, self.columns[..., None, :], values, axis=-1)
        return matrix

    def _looked_up(self) -> np.ndarray:
        if self.levels.ndim == 1:
            return self.levels[self.codes]
        return np.stack(
            [levels[codes] for levels, codes in zip(self.levels, self.codes, strict=True)]
        )

    def _repeated(self, scales: np.ndarray | CodedScales) -> np.ndarray:
        values = scales.values() if isinstance(scales, CodedScales) else scales
        wide = np.repeat(values.astype(np.float32), self.group_size, axis=-1)
        return wide[..., : self.codes.shape[-1]]


def integer_blocks(
    codes: np.ndarray,
    zeros: np.ndarray | int,
    scales: np.ndarray,
    *,
    bits: int,
    group_size: int,
    columns: np.ndarray | None = None,
) -> GridBlocks:
    """A matrix (codes - zeros) · scales.

    One zero point for the whole matrix goes into the table. Otherwise the offsets are
    zeros · -scales, kept as just that: with scales of float16 or bfloat16, at most 11 bits of
    significand, and codes and zeros of at most 8 bits, both products are exact in float32, and so
    is their sum, which is the scale times an integer of at most 9 bits.

    Args:
      codes: uint8 `[out, in]`, in the order of the matrix.
      zeros: integers `[out, groups]`, or one number.
      scales: `[out, groups]`, of float16 or bfloat16 if `zeros` is an array.
      bits: bits of a code.
      group_size: codes that share a scale.
      columns: integers `[in]`, the order in which columns are grouped; None if it is the same.

    Returns:
      The matrix; its offsets, if any, have the form :func:`zero_point_form`.

    >>> codes = np.array([[0, 3], [1, 2]], np.uint8)
    >>> scales = np.array([[0.5], [2.0]], np.float16)
    >>> integer_blocks(codes, 2, scales, bits=2, group_size=2).dense().tolist()
    [[-1.0, 0.5], [-2.0, 0.0]]
    """
    levels = np.arange(2**bits, dtype=np.float32)
    offsets = None
    if isinstance(zeros, int):
        levels -= np.float32(zeros)
    else:
        offsets = CodedScales(zeros.astype(np.uint8), -scales, zero_point_form(bits, scales.dtype))
    codes = codes if columns is None else codes[:, columns]
    return GridBlocks(codes, levels, scales, offsets, group_size, columns)


def zero_point_form(bits: int, dtype: np.dtype) -> ScaleForm:
    """That of offsets zeros · -scales, with zeros of `bits` bits and scales of `dtype`."""
    return ScaleForm(bits, block=1, zero=0, dtype=dtype)


def powers_of_two(exponents: UInt8[np.ndarray, "*shape"], bias: int) -> np.ndarray:
    """Scales 2 ** (exponents - bias) in bfloat16, which has all of them.

    Where `bias` is 127, 255 stands for NaN, and gives infinity here.

    >>> powers_of_two(np.array([126, 127, 130], np.uint8), 127).tolist()
    [0.5, 1.0, 8.0]
    """
    with np.errstate(over="ignore"):
        values = np.ldexp(np.float32(1.0), exponents.astype(np.int32) - bias)
    return values.astype(ml_dtypes.bfloat16)


def float8_values() -> np.ndarray:
    """The values of all bytes as E4M3, float32 `[256]`.

    The two that are NaN have the values that their bits would have, 480 and -480, so that kernels
    can compute all entries alike.

    >>> float8_values()[[0x01, 0x38, 0x7E, 0xFE, 0x7F]].tolist()
    [0.001953125, 1.0, 448.0, -448.0, 480.0]
    """
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values[[0x7F, 0xFF]] = 480, -480
    return values


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks codes that follow each other in little-endian words without gaps.

    Code i of a row takes the bits `[i * bits, (i + 1) * bits)` of the row.

    Args:
      words: integers `[..., words]`; a row has a whole number of codes.
      bits: bits of a code, 1 to 8.

    Returns:
      uint8 `[..., codes]`.

    >>> unpack_words(np.array([[0o76543210, 0, 0]], "<i4"), 3)[0, :9].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 0]
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    count = 8 // math.gcd(bits, 8)  # codes in the fewest whole bytes
    blocks = data.reshape(*words.shape[:-1], -1, count * bits // 8)
    codes = np.empty((*blocks.shape[:-1], count), np.uint8)
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        code = blocks[..., byte] >> shift
        if shift + bits > 8:
            code = code | blocks[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)
