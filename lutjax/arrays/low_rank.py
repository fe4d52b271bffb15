"""A weight as the product of two thin matrices."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray, cut, format_bytes
from lutjax.arrays.split import Split, typed_entries
from lutjax.arrays.view import MATRIX, MatrixView
from lutjax.dtypes import at_least_float32, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LowRankArray(CompressedArray):
    """A matrix ``W = left @ right``; products run through the thin side, ``(x @ left) @ right``.

    Attributes:
      left: ``[*batch, K, r]``.
      right: ``[*batch, r, N]``.
      dtype: Dtype of the weight this stands for.
      view: How the logical axes map onto ``[K, N]``.

    >>> w = LowRankArray.of(jnp.ones((4, 1)), jnp.ones((1, 3)))
    >>> w.matmul(jnp.ones((2, 4))).tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """

    left: Float[Array, "*batch k r"]
    right: Float[Array, "*batch r n"]
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})
    trains: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        left: Float[Array, "*batch k r"],
        right: Float[Array, "*batch r n"],
        view: MatrixView | None = None,
    ) -> Self:
        """The product of two factors that fit.

        Raises:
          ValueError: If they do not.
        """
        if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
            raise ValueError(f"factors {left.shape} and {right.shape} do not fit [K, r] @ [r, N]")
        return cls(left, right, np.dtype(left.dtype), view or MATRIX)

    @property
    def rank(self) -> int:
        """The inner size r."""
        return self.left.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that both factors share."""
        return tuple(self.left.shape[:-2])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        return self.left.shape[-2], self.right.shape[-1]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """``left @ right``, accumulated in float32."""
        wide = at_least_float32(self.dtype)
        product = jnp.matmul(self.left, self.right, preferred_element_type=wide)
        return product.astype(self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``(x @ left) @ right``."""
        return _through(x, self.left, self.right, out_dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``(x @ right.T) @ left.T``."""
        return _through(
            x, jnp.swapaxes(self.right, -1, -2), jnp.swapaxes(self.left, -1, -2), out_dtype
        )

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array:
        """Dense rows or columns, through the thin side."""
        if axis == "k":
            rows = jnp.take(self.left, indices, axis=0, mode="clip") @ self.right
        else:
            rows = jnp.take(self.right, indices, axis=1, mode="clip").T @ self.left.T
        return rows.astype(self.dtype)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Any rows or columns."""
        if axis == "k":
            return dataclasses.replace(self, left=cut(self.left, start, size, self.left.ndim - 2))
        return dataclasses.replace(self, right=cut(self.right, start, size, self.right.ndim - 1))

    def split_specs(self, split: Split) -> Any:
        """``left`` is split by rows, ``right`` by columns."""
        return dataclasses.replace(
            self, left=split.spec(split.k, None), right=split.spec(None, split.n)
        )

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes, K and N are split."""
        *batch, k, _ = typed_entries(self.left)
        return tuple(batch), k, typed_entries(self.right)[-1]

    def summary(self) -> str:
        """Shape, dtype, rank and bytes."""
        return f"shape={self.shape}, {self.dtype}, rank={self.rank}, {format_bytes(self.nbytes)}"


def _through(x: jax.Array, first: jax.Array, second: jax.Array, out_dtype: Any) -> jax.Array:
    """``x @ first @ second``.

    What is between is float32 for float16, whose range it may leave; bfloat16 has the range, and
    products with one operand in float32 would cost more than the rounding matters.
    """
    wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    return product(product(x, first, wide), second, x.dtype if out_dtype is None else out_dtype)
