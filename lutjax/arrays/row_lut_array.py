"""Lookup-table codes in the layout that activation sparsity needs: every row on its own."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from lutjax.arrays.base import CompressedArray, format_bytes
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.split import Split, typed_entries
from lutjax.arrays.view import MATRIX, MatrixView
from lutjax.dtypes import product, widened
from pallas_kernels.manual_axes import is_partitioned_automatically
from pallas_kernels.scales import expanded
from pallas_kernels.sparse_matmul import RowCodes, dequantize_rows, pack_rows, row_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RowLutArray(CompressedArray):
    """The weight of a :class:`LutArray`, packed along N instead of K.

    A layout for the running program, made at load time by :func:`lutjax.sparsity.prepack`; it is
    not meant for checkpoints. Inside a :class:`GatedArray`, its product reads live rows only.

    Attributes:
      words: ``uint32[*batch, K, blocks, L]``, see :func:`pallas_kernels.sparse_matmul.pack_rows`.
      scales: ``[*batch, ceil(K / G), N]``.
      lut: ``float32[*batch, T, 2**bits, 1]``, T = 1 or N.
      offsets: Like ``scales``, or None.
      group_size: G, rows that share a scale; the last group may be shorter.
      dtype: Dtype of the weight this stands for.
      view: How the logical axes map onto ``[K, N]``.

    >>> import lutjax
    >>> w = lutjax.quantize(jnp.eye(64), bits=4, group_size=32)
    >>> bool((RowLutArray.of(w).materialize() == w.materialize()).all())
    True
    """

    words: UInt32[Array, "..."]
    scales: Float[Array, "..."]
    lut: Float[Array, "..."]
    offsets: Float[Array, "..."] | None
    group_size: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})

    @classmethod
    def of(cls, array: LutArray, lanes: int | None = None) -> Self:
        """Repacks a canonical array.

        Args:
          array: With scalar tables.
          lanes: Words in a block of a row; None for whole rows (CPU). 32 suits GPUs, 128 TPUs.

        Raises:
          ValueError: If one code stands for several rows.
        """
        if array.vector_size > 1:
            raise ValueError(
                f"{array!r}: a code stands for {array.vector_size} rows, which cannot be read alone"
            )
        return cls(
            pack_rows(array.codes(), array.bits, lanes),
            expanded(array.scales),
            array.lut,
            expanded(array.offsets),
            array.group_size,
            array.dtype,
            array.view,
        )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all data fields share."""
        return tuple(self.words.shape[:-3])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N of the stored matrix."""
        return self.words.shape[-3], self.scales.shape[-1]

    def row_codes(self) -> RowCodes:
        """What the kernels take; without batch axes."""
        return RowCodes(self.words, self.scales, self.lut, self.offsets, self.group_size)

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense stored matrix, in :attr:`dtype`."""
        if self.batch_shape:
            return jax.vmap(lambda w: w.materialize_matrix())(self)
        return dequantize_rows(self.row_codes(), self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W``; a tile of rows is dequantised at a time."""
        return self._product(x, out_dtype, transpose=False)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T``; a tile of rows is dequantised at a time."""
        return self._product(x, out_dtype, transpose=True)

    def _product(self, x: jax.Array, out_dtype: Any, *, transpose: bool) -> jax.Array:
        if is_partitioned_automatically(self.words):  # a loop over rows would gather their codes
            weight = self.astype(x.dtype).materialize_matrix()
            return product(x, jnp.swapaxes(weight, -1, -2) if transpose else weight, out_dtype)
        if self.batch_shape:
            return jax.vmap(lambda w, x: w._product(x, out_dtype, transpose=transpose))(self, x)
        rows = widened(x.reshape(-1, x.shape[-1]), out_dtype)
        y = row_matmul(rows, self.row_codes(), transpose=transpose)
        y = y.astype(x.dtype if out_dtype is None else out_dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def split_specs(self, split: Split) -> Any:
        """Split by rows at whole groups; columns are not split, a block holds distant ones."""
        k, _ = self.matrix_shape
        if split.shards(split.n) > 1:
            raise ValueError("its columns are packed together; shard K, or the canonical LutArray")
        rows = k // split.shards(split.k)
        if k % split.shards(split.k):
            raise ValueError(f"its K={k} rows do not split into {split.shards(split.k)}")
        groups = split.k if rows % self.group_size == 0 else None
        if groups is None and split.shards(split.k) > 1:
            raise ValueError(f"shards of {rows} rows cut groups of {self.group_size}")
        scales = split.spec(groups, None)
        return dataclasses.replace(
            self,
            words=split.spec(split.k, None, None),
            scales=scales,
            lut=split.spec(None, None, None),
            offsets=None if self.offsets is None else scales,
        )

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes and K are split."""
        *batch, k, _, _ = typed_entries(self.words)
        return tuple(batch), k, None

    def summary(self) -> str:
        """Shape, dtype, bits, group size and bytes."""
        bits = self.lut.shape[-2].bit_length() - 1
        return (
            f"shape={self.shape}, {self.dtype}, {bits} bits, group_size={self.group_size}, "
            f"{format_bytes(self.nbytes)}"
        )
