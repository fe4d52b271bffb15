"""What arrays share that add something to another compressed array."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.view import MatrixView


class WrapperArray(CompressedArray):
    """A compressed array around ``base``, whose view, dtype and shapes it has.

    Subclasses are dataclasses with a data field ``base``; they say what their products do.
    """

    base: CompressedArray

    @property
    def view(self) -> MatrixView:  # type: ignore[override]
        """The view of the base."""
        return self.base.view

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """The dtype of the base."""
        return self.base.dtype

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the base."""
        return self.base.batch_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        return self.base.matrix_shape

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which the base is split."""
        return self.base.typed_spec()

    def summary(self) -> str:
        """The base's short form."""
        return repr(self.base)

    def with_view(self, view: MatrixView) -> Self:
        """The same data under another view."""
        return dataclasses.replace(self, base=self.base.with_view(view))  # type: ignore[type-var]

    def astype(self, dtype: Any) -> Self:
        """The same data standing for a weight of another dtype."""
        return dataclasses.replace(self, base=self.base.astype(dtype))  # type: ignore[type-var]
