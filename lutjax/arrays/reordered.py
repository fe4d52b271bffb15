"""A weight whose rows are stored in another order."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.split import Split
from lutjax.arrays.wrapper import WrapperArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ReorderedArray(WrapperArray):
    """``W[order] = base``: products reorder the activations, ``x @ W = x[:, order] @ base``.

    Attributes:
      base: The weight with its rows in the stored order.
      order: ``int32[*batch, K]``, which row of W each stored row is.

    Source: GPTQ with sorted inputs (arXiv 2210.17323; ``desc_act`` in its implementations).

    >>> from lutjax.arrays import DenseArray
    >>> w = ReorderedArray.of(DenseArray.of(jnp.array([[1.0], [2.0]])), jnp.array([1, 0]))
    >>> w.materialize().tolist()
    [[2.0], [1.0]]
    """

    base: CompressedArray
    order: Int32[Array, "*batch k"]

    @classmethod
    def of(cls, base: CompressedArray, order: jax.Array) -> Self:
        """Takes an array that stands for ``W[order]`` as the weight W.

        Raises:
          ValueError: If ``order`` does not have one entry for each row.
        """
        rows = (*base.batch_shape, base.matrix_shape[0])
        if order.shape != rows:
            raise ValueError(f"order has shape {order.shape}; the rows of {base!r} need {rows}")
        return cls(base, order.astype(jnp.int32))

    @property
    def _places(self) -> jax.Array:
        """Where each row of W is stored."""
        return jnp.argsort(self.order, axis=-1)

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense matrix, in the base's dtype."""
        stored = self.base.materialize_matrix()
        return jnp.take_along_axis(stored, self._places[..., None], axis=-2)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x[:, order] @ base``."""
        return self.base.matmul(_columns(x, self.order), out_dtype=out_dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ base.T`` with its columns put back."""
        return _columns(self.base.matmul_transposed(x, out_dtype=out_dtype), self._places)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Rows and columns as the base has them."""
        if axis == "k":
            return self.base.take_matrix("k", self._places[indices])
        columns = self.base.take_matrix("n", indices)
        return None if columns is None else _columns(columns, self._places)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Columns as the base has them; neighbouring rows are stored anywhere."""
        base = self.base.slice_matrix(axis, start, size) if axis == "n" else None
        return None if base is None else dataclasses.replace(self, base=base)

    def split_specs(self, split: Split) -> Any:
        """As the base is split, by columns only."""
        if split.shards(split.k) > 1:
            raise ValueError("its rows are reordered over all of K, which does not split; shard N")
        return dataclasses.replace(self, base=self.base.split_specs(split), order=split.spec(None))


def _columns(x: jax.Array, order: jax.Array) -> jax.Array:
    """``x[..., order]``, for each of the batch axes with which both lead."""
    if order.ndim == 1:
        return jnp.take(x, order, axis=-1, mode="clip")
    between = [1] * (x.ndim - order.ndim)
    order = order.reshape(*order.shape[:-1], *between, order.shape[-1])
    return jnp.take_along_axis(x, order, axis=-1)
