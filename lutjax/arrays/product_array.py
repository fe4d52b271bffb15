"""A weight as the product of two compressed matrices, such as quantised low-rank factors."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.split import Split
from lutjax.arrays.view import MATRIX, MatrixView
from lutjax.dtypes import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ProductArray(CompressedArray):
    """A matrix ``W = left @ right`` whose factors are compressed themselves.

    The inference form of an adapter: with :class:`LutArray` factors of 8 bits it takes a quarter of
    what :class:`LowRankArray` takes in float32.

    Attributes:
      left: ``[*batch, K, r]``.
      right: ``[*batch, r, N]``.
      view: How the logical axes map onto ``[K, N]``.

    Source: NF8 adapters of LQ-LoRA (arXiv 2311.12023, section 4.4).

    >>> import lutjax
    >>> left, right = (lutjax.quantize(jnp.eye(32), bits=8, group_size=32) for _ in range(2))
    >>> bool((ProductArray.of(left, right).materialize() == jnp.eye(32)).all())
    True
    """

    left: CompressedArray
    right: CompressedArray
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})

    @classmethod
    def of(
        cls, left: CompressedArray, right: CompressedArray, view: MatrixView | None = None
    ) -> Self:
        """The product of two compressed matrices that fit.

        Raises:
          ValueError: If they do not.
        """
        if left.batch_shape != right.batch_shape or left.matrix_shape[1] != right.matrix_shape[0]:
            raise ValueError(f"factors {left} and {right} do not fit [K, r] @ [r, N]")
        return cls(left, right.astype(left.dtype), view or MATRIX)

    @property
    def rank(self) -> int:
        """The inner size r."""
        return self.left.matrix_shape[1]

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Dtype of the weight this stands for."""
        return self.left.dtype

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that both factors share."""
        return self.left.batch_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        return self.left.matrix_shape[0], self.right.matrix_shape[1]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """``left @ right``, accumulated in float32."""
        factors = (self.left.materialize_matrix(), self.right.materialize_matrix())
        wide = at_least_float32(self.dtype)
        return jnp.matmul(*factors, preferred_element_type=wide).astype(self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``(x @ left) @ right``."""
        return self.right.matmul(self.left.matmul(x), out_dtype=out_dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``(x @ right.T) @ left.T``."""
        return self.left.matmul_transposed(self.right.matmul_transposed(x), out_dtype=out_dtype)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Dense rows or columns, through the thin side."""
        if axis == "k":
            rows = self.left.take_matrix("k", indices)
            return None if rows is None else self.right.matmul(rows)
        columns = self.right.take_matrix("n", indices)
        return None if columns is None else self.left.matmul_transposed(columns)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Rows or columns, None if that factor cannot be cut there."""
        part = (self.left if axis == "k" else self.right).slice_matrix(axis, start, size)
        if part is None:
            return None
        left, right = (part, self.right) if axis == "k" else (self.left, part)
        return dataclasses.replace(self, left=left, right=right)

    def split_specs(self, split: Split) -> Any:
        """``left`` is split by rows, ``right`` by columns."""
        return dataclasses.replace(
            self,
            left=self.left.split_specs(dataclasses.replace(split, n=None)),
            right=self.right.split_specs(dataclasses.replace(split, k=None)),
        )

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes, K and N are split."""
        batch, k, _ = self.left.typed_spec()
        return batch, k, self.right.typed_spec()[2]

    def astype(self, dtype: Any) -> Self:
        """The same factors standing for a weight of another dtype."""
        return dataclasses.replace(
            self, left=self.left.astype(dtype), right=self.right.astype(dtype)
        )

    def summary(self) -> str:
        """The factors' short forms."""
        return f"{self.left!r} @ {self.right!r}"
