"""A weight as a frozen base plus the transpose of a linear map applied to a small trained array."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays import CompressedArray, MatrixView, format_bytes, is_compressed
from lutjax.arrays.view import MATRIX
from lutjax.linear_maps import BoundMap, Reshaped


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "map", "latent"],
    meta_fields=["train_factor", "view"],
)
@dataclasses.dataclass(frozen=True)
class AdapterArray(CompressedArray):
    """`W = W_0 + S^T latent`, as two products: neither `W` nor its gradient is ever formed.

    `x @ W = x @ W_0 + (x @ P) @ latent` for a one-sided map. With :func:`lutjax.lift` any function
    runs on it, and its gradient with respect to the latent costs thin products only.

    Attributes:
      base: `W_0`, frozen: a stored matrix `[*batch, K, N]`, or a compressed array.
      map: `S`, on the stored matrix.
      latent: What is trained.
      train_factor: Whether the map's own factor is trained too (LoRA, KronA).
      view: How the logical axes map onto the stored matrix.

    >>> from lutjax.linear_maps import Gaussian
    >>> bound = Gaussian(rank=2).init(jax.random.key(0), (4, 6))
    >>> adapter = AdapterArray.of(jnp.ones((4, 6)), bound)
    >>> adapter.shape, adapter.latent.shape
    ((4, 6), (2, 6))
    """

    base: Array | CompressedArray
    map: BoundMap
    latent: Float[Array, "..."]
    train_factor: bool = False
    view: MatrixView = MATRIX

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
          base: The weight.
          bound: The map.
          latent: Zeros if None.
          train_factor: Whether the map's own factor is trained too.
          dtype: Of those zeros; that of the weight if None.

        Raises:
          ValueError: For a compressed base whose view is not that of the map.
        """
        view, matrix = MATRIX, base
        if isinstance(bound, Reshaped):
            contract, _ = bound.numbers
            axes = (contract,) if isinstance(contract, int) else tuple(contract)
            view = MatrixView.of(bound.shape, tuple(a % len(bound.shape) for a in axes))
        if isinstance(base, CompressedArray):
            if base.view != view:
                raise ValueError(f"the map is for the view {view}, but {base} has {base.view}")
            batch = len(base.batch_shape)
        else:
            batch = base.ndim - len(view.order)
            matrix = view.to_matrix(base, batch)
        inner = bound.inner if isinstance(bound, Reshaped) else bound
        if latent is None:
            dtype = base.dtype if dtype is None else dtype
            shape = (
                (*base.batch_shape, *base.matrix_shape)
                if isinstance(base, CompressedArray)
                else matrix.shape
            )
            like = jax.eval_shape(inner.down, jax.ShapeDtypeStruct(shape, dtype))
            latent = jnp.zeros(like.shape, like.dtype)
        return cls(matrix, inner, latent, train_factor, view)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """The dtype of the weight."""
        return np.dtype(self.base.dtype)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all data fields share."""
        if isinstance(self.base, CompressedArray):
            return self.base.batch_shape
        return tuple(self.base.shape[:-2])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        if isinstance(self.base, CompressedArray):
            return self.base.matrix_shape
        return self.base.shape[-2], self.base.shape[-1]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """`W_0 + S^T latent` in the dtype of the base."""
        base = self.base
        dense = base.materialize_matrix() if isinstance(base, CompressedArray) else base
        return self.map.adapter(dense, self.latent)

    def matmul(self, x: Float[Array, "*batch m k"]) -> Float[Array, "*batch m n"]:
        """`x @ W_0 + x @ S^T latent`, in the dtype of `x`."""
        if self.batch_shape:
            return jax.vmap(lambda w, x: w.matmul(x))(self, x)
        base = self.base
        product = base.matmul(x) if isinstance(base, CompressedArray) else x @ base.astype(x.dtype)
        return product + self.map.apply(x, self.latent.astype(x.dtype))

    def matmul_transposed(self, x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m k"]:
        """`x @ W_0^T + x @ (S^T latent)^T`, in the dtype of `x`."""
        if self.batch_shape:
            return jax.vmap(lambda w, x: w.matmul_transposed(x))(self, x)
        base = self.base
        product = (
            base.matmul_transposed(x)
            if isinstance(base, CompressedArray)
            else x @ base.astype(x.dtype).T
        )
        return product + self.map.apply_transposed(x, self.latent.astype(x.dtype))

    def with_view(self, view: MatrixView) -> Self:
        """The same data under another view."""
        return dataclasses.replace(self, view=view)

    def astype(self, dtype: Any) -> Self:
        """The same weight in another dtype; the latent keeps its own."""
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def __repr__(self) -> str:
        """Shapes and bytes; never the arrays."""
        try:
            base = repr(self.base) if is_compressed(self.base) else "dense"
            return (
                f"AdapterArray(shape={self.shape}, {self.dtype}, base={base}, "
                f"{type(self.map).__name__}, latent={tuple(self.latent.shape)}, "
                f"{format_bytes(self.nbytes)})"
            )
        except (AttributeError, IndexError, TypeError):  # placeholders instead of arrays
            return f"AdapterArray(base={self.base!r}, latent={self.latent!r})"


def is_adapter(x: Any) -> bool:
    """Whether `x` is an :class:`AdapterArray`; use it as ``is_leaf``."""
    return isinstance(x, AdapterArray)
