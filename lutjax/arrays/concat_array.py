"""Weights side by side, such as the query, key and value kernels of one fused product."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.view import MatrixView
from lutjax.dtypes import add_wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ConcatArray(CompressedArray):
    """``W = [W1 W2 ...]`` by columns (``axis="n"``) or by rows (``axis="k"``); no data is copied.

    What ``jnp.concatenate`` of compressed weights gives inside :func:`lutjax.lift`.

    Attributes:
      parts: Compressed arrays that agree in dtype, view, batch axes and the other side.
      axis: The side of the stored matrix along which they are joined.

    >>> import jax.numpy as jnp
    >>> from lutjax.arrays import LowRankArray
    >>> part = LowRankArray.of(jnp.ones((2, 1)), jnp.ones((1, 2)))
    >>> ConcatArray.of(part, part, axis="n").matmul(jnp.ones((1, 2))).tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """

    parts: tuple[CompressedArray, ...]
    axis: Literal["k", "n"] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, *parts: CompressedArray, axis: Literal["k", "n"]) -> Self:
        """The concatenation of parts that fit.

        Raises:
          ValueError: If views, dtypes, batch axes or the sizes of the other side differ.
        """
        other = 1 if axis == "k" else 0
        first = parts[0]
        for part in parts[1:]:
            if (
                part.view != first.view
                or part.dtype != first.dtype
                or part.batch_shape != first.batch_shape
                or part.matrix_shape[other] != first.matrix_shape[other]
            ):
                raise ValueError(f"cannot concatenate {part!r} to {first!r} along {axis}")
        return cls(tuple(parts), axis)

    @property
    def view(self) -> MatrixView:  # type: ignore[override]
        """The view that all parts share."""
        return self.parts[0].view

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Dtype of the weight this stands for."""
        return self.parts[0].dtype

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all parts share."""
        return self.parts[0].batch_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N of the stored matrix."""
        k, n = self.parts[0].matrix_shape
        return (sum(self._sizes), n) if self.axis == "k" else (k, sum(self._sizes))

    @property
    def _sizes(self) -> list[int]:
        return [part.matrix_shape["kn".index(self.axis)] for part in self.parts]

    @property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self._sizes)]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The parts' dense matrices, joined."""
        dense = [part.materialize_matrix() for part in self.parts]
        return jnp.concatenate(dense, axis=-2 if self.axis == "k" else -1)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """Products of the parts, joined along N or summed over K."""
        return self._product([p.matmul for p in self.parts], x, out_dtype, joins=self.axis == "n")

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """Transposed products of the parts, joined along K or summed over N."""
        return self._product(
            [p.matmul_transposed for p in self.parts], x, out_dtype, joins=self.axis == "k"
        )

    def _product(self, products: list, x: jax.Array, out_dtype: Any, *, joins: bool) -> jax.Array:
        if joins:
            return jnp.concatenate([product(x, out_dtype=out_dtype) for product in products], -1)
        pieces = zip(products, jnp.split(x, self._starts[1:-1], axis=-1), strict=True)
        return add_wide([product(piece, out_dtype=out_dtype) for product, piece in pieces])

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Rows or columns of each part, joined; along the joint, each index picks its part."""
        rows: Any = []
        for part, begin in zip(self.parts, self._starts[:-1], strict=True):
            local = indices if axis != self.axis else indices - begin
            last = part.matrix_shape["kn".index(axis)] - 1
            rows.append(part.take_matrix(axis, jnp.clip(local, 0, last)))
            if rows[-1] is None:
                return None
        if axis != self.axis:
            return jnp.concatenate(rows, axis=-1)
        place = jnp.searchsorted(jnp.asarray(self._starts[1:]), indices, side="right")
        return jnp.take_along_axis(jnp.stack(rows), place[None, :, None], axis=0)[0]

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """A slice of every part that it meets."""
        if axis == self.axis and not isinstance(start, int):
            return None
        slices = []
        for part, begin in zip(self.parts, self._starts[:-1], strict=True):
            if axis != self.axis:
                slices.append(part.slice_matrix(axis, start, size))
                continue
            length = part.matrix_shape["kn".index(axis)]
            low, high = max(start - begin, 0), min(start + size - begin, length)
            if low < high:
                whole = (low, high) == (0, length)
                slices.append(part if whole else part.slice_matrix(axis, low, high - low))
        kept = [part for part in slices if part is not None]
        return type(self)(tuple(kept), self.axis) if kept and len(kept) == len(slices) else None

    def with_view(self, view: MatrixView) -> Self:
        """The same parts under another view."""
        return type(self)(tuple(part.with_view(view) for part in self.parts), self.axis)

    def astype(self, dtype: Any) -> Self:
        """The same parts standing for a weight of another dtype."""
        return type(self)(tuple(part.astype(dtype) for part in self.parts), self.axis)

    def summary(self) -> str:
        """The parts' short forms."""
        return f"{', '.join(map(repr, self.parts))}, axis={self.axis!r}"
