"""A dense weight in the clothes of a compressed one."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray, cut
from lutjax.arrays.split import Split, typed_entries
from lutjax.arrays.view import MATRIX, MatrixView
from lutjax.dtypes import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DenseArray(CompressedArray):
    """A matrix ``W`` as it is, so that wrappers such as :class:`GatedArray` can hold one.

    A weight ``[K, N]`` is not copied: the wrapper shares its buffer.

    Attributes:
      matrix: ``[*batch, K, N]``.
      dtype: Dtype of the weight this stands for.
      view: How the logical axes map onto ``[K, N]``.

    >>> DenseArray.of(jnp.eye(2)).matmul(jnp.ones((1, 2))).tolist()
    [[1.0, 1.0]]
    """

    matrix: Float[Array, "*batch k n"]
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})

    @classmethod
    def of(
        cls, weight: Float[Array, "..."], batch_ndim: int = 0, view: MatrixView = MATRIX
    ) -> Self:
        """A logical weight ``[*batch, *axes]`` whose axes ``view`` maps onto ``[K, N]``."""
        matrix = weight if view == MATRIX else view.to_matrix(weight, batch_ndim)
        return cls(matrix, np.dtype(weight.dtype), view)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes."""
        return tuple(self.matrix.shape[:-2])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        return self.matrix.shape[-2], self.matrix.shape[-1]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The matrix, in :attr:`dtype`."""
        return self.matrix.astype(self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W``."""
        return product(x, self.matrix, out_dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T``."""
        return product(x, jnp.swapaxes(self.matrix, -1, -2), out_dtype)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array:
        """Rows or columns."""
        matrix = self.matrix if axis == "k" else self.matrix.T
        return jnp.take(matrix, indices, axis=0, mode="clip").astype(self.dtype)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self:
        """Any rows or columns."""
        place = self.matrix.ndim - (2 if axis == "k" else 1)
        return dataclasses.replace(self, matrix=cut(self.matrix, start, size, place))

    def split_specs(self, split: Split) -> Any:
        """Split like the matrix."""
        return dataclasses.replace(self, matrix=split.spec(split.k, split.n))

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes, K and N are split."""
        *batch, k, n = typed_entries(self.matrix)
        return tuple(batch), k, n
