"""A lookup-table weight in the canonical layout, as the sparse product takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lut_matmul import dequantize
from pallas_kernels.scales import QuantizedScales, expanded

ROWS_TOGETHER = "canonical words keep eight rows together; pack_rows makes RowCodes of them"
"""The reason of kernels that skip rows by not loading them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCodes:
    """A lookup-table weight as :func:`pallas_kernels.lut_matmul.lut_matmul` takes it.

    The words keep eight rows together (:mod:`pallas_kernels.layout`). C++ on a CPU skips the
    lookups of single rows in them; kernels that skip loads need :class:`RowCodes`.

    Attributes:
      words: ``uint8[ceil(K / 8), bits, N]``.
      scales: ``[ceil(K / G), N]``, or :class:`~pallas_kernels.scales.QuantizedScales`.
      lut: ``[T, 2**bits, 1]``; T = 1 or N tables.
      offsets: Like ``scales``, or None.
      k: Rows K of the weight.
      group_size: Rows G that share a scale.
    """

    words: jax.Array
    scales: jax.Array | QuantizedScales
    lut: jax.Array
    offsets: jax.Array | QuantizedScales | None
    k: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return self.k, self.words.shape[-1]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.words.shape[-2]

    @property
    def dtype(self) -> Any:
        """Dtype of the scales."""
        return self.scales.dtype


def dequantize_blocks(weight: BlockCodes, dtype: Any = jnp.float32) -> jax.Array:
    """The dense matrix ``dtype[K, N]``, computed in float32 and rounded once."""
    return dequantize(
        weight.words,
        expanded(weight.scales),
        weight.lut,
        expanded(weight.offsets),
        k=weight.k,
        group_size=weight.group_size,
        dtype=dtype,
    )
