"""A weight as a frozen base plus the transpose of a linear map applied to a small trained array."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lutjax.arrays import (
    CompressedArray,
    DenseArray,
    LowRankArray,
    WrapperArray,
    format_bytes,
)
from lutjax.arrays.split import Split
from lutjax.arrays.view import MATRIX
from lutjax.dtypes import add_wide, widened
from lutjax.linear_maps import BoundMap, Projection, Reshaped
from lutjax.linear_maps.one_sided import OneSidedMap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class AdapterArray(WrapperArray):
    """`W = W_0 + S^T latent`, as two products: neither `W` nor its gradient is formed.

    `x @ W = x @ W_0 + (x @ P) @ latent` for a one-sided map. With :func:`lutjax.lift` any function
    runs on it, and its gradient with respect to the latent costs thin products only. The exception
    are maps that choose entries (:class:`lutjax.linear_maps.PrincipalWeights`) or keep all
    (``Identity``), for which `S^T latent` is formed.

    Attributes:
      base: `W_0`, frozen.
      map: `S`, on the stored matrix.
      latent: What is trained.
      train_factor: Whether the map's own factor is trained too (LoRA, KronA).

    >>> from lutjax.linear_maps import Gaussian
    >>> bound = Gaussian(rank=2).init(jax.random.key(0), (4, 6))
    >>> adapter = AdapterArray.of(jnp.ones((4, 6)), bound)
    >>> adapter.shape, adapter.latent.shape
    ((4, 6), (2, 6))
    """

    base: CompressedArray
    map: BoundMap
    latent: Float[Array, "..."]
    train_factor: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls,
        base: Array | CompressedArray,
        bound: BoundMap,
        latent: Float[Array, "..."] | None = None,
        *,
        train_factor: bool = False,
        dtype: Any = None,
    ) -> Self:
        """The adapter of a weight for a map on its logical shape.

        Args:
          base: The weight, whose buffer is shared.
          bound: The map.
          latent: Zeros if None.
          train_factor: Whether the map's own factor is trained too.
          dtype: Of those zeros; that of the weight if None.

        Raises:
          ValueError: For a compressed base whose view is not that of the map.
        """
        view = MATRIX
        if isinstance(bound, Reshaped):
            view, bound = bound.view, bound.inner
        if not isinstance(base, CompressedArray):
            base = DenseArray.of(base, base.ndim - len(view.order), view)
        elif base.view != view:
            raise ValueError(f"the map is for the view {view}, but {base} has {base.view}")
        if latent is None:
            matrix = jax.ShapeDtypeStruct(
                (*base.batch_shape, *base.matrix_shape), dtype or base.dtype
            )
            like = jax.eval_shape(bound.down, matrix)
            latent = jnp.zeros(like.shape, like.dtype)
        return cls(base, bound, latent, train_factor)

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """`W_0 + S^T latent` in the dtype of the base."""
        return self.map.adapter(self.base.materialize_matrix(), self.latent)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """`x @ W_0 + x @ S^T latent`."""
        if self.batch_shape:
            return jax.vmap(lambda w, x: w.matmul(x, out_dtype=out_dtype))(self, x)
        y = self.base.matmul(x, out_dtype=out_dtype)
        rows = widened(x, y.dtype)
        return y + self.map.apply(rows, self.latent.astype(rows.dtype)).astype(y.dtype)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """`x @ W_0^T + x @ (S^T latent)^T`."""
        if self.batch_shape:
            return jax.vmap(lambda w, x: w.matmul_transposed(x, out_dtype=out_dtype))(self, x)
        y = self.base.matmul_transposed(x, out_dtype=out_dtype)
        rows = widened(x, y.dtype)
        return y + self.map.apply_transposed(rows, self.latent.astype(rows.dtype)).astype(y.dtype)

    def low_rank(self) -> LowRankArray | None:
        """`S^T latent` as two thin matrices, None if the map is not one-sided."""
        if not isinstance(self.map, OneSidedMap):
            return None
        basis = self.map.basis.astype(self.latent.dtype)
        if self.map.side == "left":
            return LowRankArray.of(basis, self.latent, self.view)
        return LowRankArray.of(self.latent, jnp.matrix_transpose(basis), self.view)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Rows or columns of the base, and through the thin side; None where they cannot be had."""
        rows, added = self.base.take_matrix(axis, indices), self.low_rank()
        if rows is None or added is None:
            return None
        return add_wide([rows, added.astype(rows.dtype).take_matrix(axis, indices)])

    def split_specs(self, split: Split) -> Any:
        """The base's, and those of two thin matrices; factors of other maps are replicated."""
        specs = dataclasses.replace(super().split_specs(split), base=self.base.split_specs(split))
        if not isinstance(self.map, Projection):
            return specs
        rows, columns = split.spec(split.k, None), split.spec(None, split.n)
        if self.map.side == "left":
            basis, latent = rows, columns
        else:
            basis, latent = split.spec(split.n, None), rows
        return dataclasses.replace(
            specs, map=dataclasses.replace(self.map, basis=basis), latent=latent
        )

    def summary(self) -> str:
        """Shapes and bytes."""
        base = "dense" if isinstance(self.base, DenseArray) else repr(self.base)
        return (
            f"shape={self.shape}, {self.dtype}, base={base}, {type(self.map).__name__}, "
            f"latent={tuple(self.latent.shape)}, {format_bytes(self.nbytes)}"
        )


def is_adapter(x: Any) -> bool:
    """Whether `x` is an :class:`AdapterArray`; use it as ``is_leaf``."""
    return isinstance(x, AdapterArray)
