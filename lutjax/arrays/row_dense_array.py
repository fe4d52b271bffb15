"""A dense weight in the layout that activation sparsity needs on a TPU: every row on its own."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.dense_array import DenseArray
from lutjax.arrays.split import Split, typed_entries
from lutjax.arrays.view import MATRIX, MatrixView
from lutjax.dtypes import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RowDenseArray(CompressedArray):
    """The matrix of a :class:`DenseArray` with its columns in blocks, so that a row is contiguous.

    A TPU stores the last two axes in tiles, which would mix the rows of ``[K, N]``. A layout for
    the running program, made at load time by :func:`lutjax.sparsity.prepack`.

    Attributes:
      blocks: ``[*batch, K, N / L, L]``.
      dtype: Dtype of the weight this stands for.
      view: How the logical axes map onto ``[K, N]``.

    >>> RowDenseArray.of(DenseArray.of(jnp.eye(4)), lanes=2).blocks.shape
    (4, 2, 2)
    """

    blocks: Float[Array, "*batch k blocks l"]
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})

    @classmethod
    def of(cls, array: DenseArray, lanes: int) -> Self:
        """Blocks of ``lanes`` columns, which must divide N."""
        *lead, n = array.matrix.shape
        if n % lanes:
            raise ValueError(f"N={n} of {array!r} is no multiple of lanes={lanes}")
        return cls(array.matrix.reshape(*lead, n // lanes, lanes), array.dtype, array.view)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes."""
        return tuple(self.blocks.shape[:-3])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        return self.blocks.shape[-3], self.blocks.shape[-2] * self.blocks.shape[-1]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The matrix, in :attr:`dtype`."""
        return self.blocks.reshape(*self.batch_shape, *self.matrix_shape).astype(self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W``."""
        return product(x, self.materialize_matrix(), out_dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T``."""
        return product(x, jnp.swapaxes(self.materialize_matrix(), -1, -2), out_dtype)

    def split_specs(self, split: Split) -> Any:
        """Split by rows anywhere, and by columns at whole blocks."""
        blocks, shards = self.blocks.shape[-2], split.shards(split.n)
        if blocks % shards:
            raise ValueError(f"its {blocks} blocks of columns do not split into {shards}")
        return dataclasses.replace(self, blocks=split.spec(split.k, split.n, None))

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes, K and N are split."""
        *batch, k, n, _ = typed_entries(self.blocks)
        return tuple(batch), k, n
