"""A weight that is stored rotated."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.packed_lut_array import PackedLutArray
from lutjax.arrays.split import Split
from lutjax.arrays.wrapper import WrapperArray
from lutjax.dtypes import at_least_float32
from lutjax.rotation import is_power_of_two, rotate, rotate_back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RotatedArray(WrapperArray):
    """``W = R.T @ base``: products rotate the activations, ``x @ W = rotate(x) @ base``.

    Attributes:
      base: The rotated weight ``R @ W``.
      block: Rows that are rotated together, a power of two; see :mod:`lutjax.rotation`.

    Source: HIGGS (arXiv 2411.17525, section 3).

    >>> from lutjax.arrays import DenseArray
    >>> w = RotatedArray.of(DenseArray.of(rotate(jnp.eye(4), 4).T), 4)
    >>> w.matmul(jnp.array([[1.0, 2.0, 3.0, 4.0]])).tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """

    base: CompressedArray
    block: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, base: CompressedArray, block: int) -> Self:
        """Takes an array that stands for ``R @ W`` as the weight W.

        Raises:
          ValueError: If ``block`` is no power of two.
        """
        if not is_power_of_two(block):
            raise ValueError(f"block={block} must be a power of two")
        return cls(base, block)

    @property
    def _wide_base(self) -> CompressedArray:
        """The base in at least float32, where it can be had."""
        if isinstance(self.base, PackedLutArray):  # for activations of one dtype
            return self.base
        return self.base.astype(at_least_float32(self.dtype))

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense matrix; if not prepacked, rounded to :attr:`dtype` after it is rotated back."""
        rotated = self._wide_base.materialize_matrix()
        back = rotate_back(jnp.swapaxes(rotated, -1, -2), self.block)
        return jnp.swapaxes(back, -1, -2).astype(self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``rotate(x) @ base``; what is rotated is rounded to the dtype of ``x``."""
        return self.base.matmul(rotate(x, self.block), out_dtype=out_dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ base.T``, rotated back; both are rounded to ``out_dtype``."""
        return rotate_back(self.base.matmul_transposed(x, out_dtype=out_dtype), self.block)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Columns; a row depends on its whole block."""
        if axis == "k":
            return None
        columns: jax.Array | None
        if isinstance(self.base, PackedLutArray):
            columns = self.base.take_columns(indices, at_least_float32(self.dtype))
        else:
            columns = self._wide_base.take_matrix(axis, indices)
        return None if columns is None else rotate_back(columns, self.block).astype(self.dtype)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Columns as the base has them, and rows at the boundaries of blocks."""
        if axis == "k":
            whole = size % self.block == 0 or start + size == self.matrix_shape[0]
            if not isinstance(start, int) or start % self.block or not whole:
                return None
        base = self.base.slice_matrix(axis, start, size)
        return None if base is None else dataclasses.replace(self, base=base)

    def split_specs(self, split: Split) -> Any:
        """As the base is split; rows in whole blocks."""
        shards = split.shards(split.k)
        k = self.matrix_shape[0]
        if shards > 1 and k % (shards * self.block):
            raise ValueError(
                f"its K={k} rows do not split into {shards} times whole rotated blocks of "
                f"{self.block}; shard N, or quantize with a smaller group_size"
            )
        return dataclasses.replace(self, base=self.base.split_specs(split))

    def summary(self) -> str:
        """The block and what is rotated."""
        return f"block={self.block}, {self.base!r}"
