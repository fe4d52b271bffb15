"""A weight as the sum of several arrays, such as a quantised part and a low-rank part."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.split import Split
from lutjax.arrays.view import MatrixView
from lutjax.dtypes import add_wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SumArray(CompressedArray):
    """``W = sum of parts``; each product is the sum of the parts' products.

    A part's product has the dtype of the activations; they are added in at least float32.

    Attributes:
      parts: Compressed arrays of one shape, dtype and view. Dense parts do not occur.

    Source: LQ-LoRA (arXiv 2311.12023): a quantised part plus a low-rank one.

    >>> import jax.numpy as jnp
    >>> from lutjax.arrays import LowRankArray
    >>> part = LowRankArray.of(jnp.ones((2, 1)), jnp.ones((1, 2)))
    >>> SumArray.of(part, part).materialize().tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """

    parts: tuple[CompressedArray, ...]

    @classmethod
    def of(cls, *parts: CompressedArray) -> Self:
        """The sum of parts that fit; sums among them are flattened.

        Raises:
          ValueError: If shapes or views differ.
        """
        flat = [p for part in parts for p in (part.parts if isinstance(part, cls) else (part,))]
        first = flat[0]
        for part in flat[1:]:
            if part.shape != first.shape or part.view != first.view:
                raise ValueError(f"cannot add {part!r} to {first!r}: shapes or views differ")
        return cls(tuple(part.astype(first.dtype) for part in flat))

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
        return self.parts[0].matrix_shape

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The sum of the parts' dense matrices."""
        return add_wide([p.materialize_matrix() for p in self.parts])

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """The sum of the parts' products with ``x``."""
        return add_wide([p.matmul(x, out_dtype=out_dtype) for p in self.parts])

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """The sum of the parts' transposed products with ``x``."""
        return add_wide([p.matmul_transposed(x, out_dtype=out_dtype) for p in self.parts])

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """The sum of the parts' rows or columns, None if one of them has none."""
        rows = [r for p in self.parts if (r := p.take_matrix(axis, indices)) is not None]
        return add_wide(rows) if len(rows) == len(self.parts) else None

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """A slice of every part, None if one of them has none."""
        parts = [p.slice_matrix(axis, start, size) for p in self.parts]
        if any(p is None for p in parts):
            return None
        return type(self)(tuple(p for p in parts if p is not None))

    def split_specs(self, split: Split) -> Any:
        """The parts' specs."""
        return type(self)(tuple(p.split_specs(split) for p in self.parts))

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which the first part is split."""
        return self.parts[0].typed_spec()

    def with_view(self, view: MatrixView) -> Self:
        """The same parts under another view."""
        return type(self)(tuple(p.with_view(view) for p in self.parts))

    def astype(self, dtype: Any) -> Self:
        """The same parts standing for a weight of another dtype."""
        return type(self)(tuple(p.astype(dtype) for p in self.parts))

    def summary(self) -> str:
        """The parts' short forms."""
        return ", ".join(map(repr, self.parts))
