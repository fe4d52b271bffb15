"""A weight that ignores small activations."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lutjax.arrays.base import CompressedArray, cut
from lutjax.arrays.dense_array import DenseArray
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.row_dense_array import RowDenseArray
from lutjax.arrays.row_lut_array import RowLutArray
from lutjax.arrays.split import Split
from lutjax.arrays.sum_array import SumArray
from lutjax.arrays.wrapper import WrapperArray
from lutjax.dtypes import add_wide, widened
from pallas_kernels.manual_axes import is_partitioned_automatically
from pallas_kernels.sparse_matmul import sparse_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class GatedArray(WrapperArray):
    """``x @ W`` becomes ``(x * [|x| > t]) @ W``, or ``(x * [|x| * norms > t]) @ W``.

    The threshold is data: another one needs no compilation. With few rows of ``x`` (decoding) the
    rows of ``W`` that meet only zeros are skipped: of a dense or lookup-table weight on a CPU, of a
    dense or row-packed one (:class:`RowLutArray`) on a GPU, of one that is packed by rows
    (:class:`RowDenseArray`, :class:`RowLutArray`) on a TPU.

    The gate belongs to the product over K. The dense form (:meth:`materialize`), the transposed
    product and lookups are those of the weight inside. The gradient of ``x`` is zero where ``x``
    was ignored.

    Attributes:
      base: The weight, dense (:class:`DenseArray`) or compressed.
      threshold: ``float32[*batch]``; 0 ignores nothing but zeros.
      row_norms: ``float32[*batch, K]`` that scale ``|x|`` before the comparison, or None.

    Source: TEAL (arXiv 2408.14690); with row norms, WINA (arXiv 2505.19427).

    >>> gated = GatedArray.of(DenseArray.of(jnp.eye(3)), 0.5)
    >>> gated.matmul(jnp.array([[0.4, -1.0, 2.0]])).tolist()
    [[0.0, -1.0, 2.0]]
    """

    base: CompressedArray
    threshold: Float[Array, "*batch"]
    row_norms: Float[Array, "*batch k"] | None = None

    @classmethod
    def of(
        cls,
        base: CompressedArray,
        threshold: Any,
        row_norms: Float[Array, "*batch k"] | None = None,
    ) -> Self:
        """Gates a weight.

        Args:
          base: The weight, without a gate.
          threshold: A number, or one for each of the weight's batch entries.
          row_norms: ``[*batch, K]`` or None.

        Raises:
          ValueError: If shapes do not fit, or a threshold is negative or NaN.
          TypeError: If ``base`` is gated already.
        """
        if isinstance(base, cls):
            raise TypeError(f"{base!r} is gated already; gate the weight inside it")
        values = np.asarray(threshold, np.float32)
        if not (values >= 0).all():
            raise ValueError(f"threshold={threshold} must be 0 or positive")
        if values.shape not in ((), base.batch_shape):
            raise ValueError(f"threshold of shape {values.shape} does not fit {base!r}")
        expected = (*base.batch_shape, base.matrix_shape[0])
        if row_norms is not None and row_norms.shape != expected:
            raise ValueError(f"row_norms of shape {row_norms.shape} must have shape {expected}")
        return cls(base, jnp.asarray(np.broadcast_to(values, base.batch_shape)), row_norms)

    def row_thresholds(self) -> Float[Array, "*batch k_or_1"]:
        """What ``|x|`` is compared with: one number, or one for each row."""
        threshold = self.threshold[..., None]
        if self.row_norms is None:
            return threshold
        safe = jnp.where(self.row_norms > 0, self.row_norms, 1)
        return jnp.where(self.row_norms > 0, threshold / safe, jnp.inf)

    def ignored(self, x: Float[Array, "*batch m k"]) -> Bool[Array, "*batch m k"]:
        """Which activations the product takes as zero; NaN is never among them."""
        return jnp.abs(x).astype(jnp.float32) <= self.row_thresholds()[..., None, :]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense matrix of the weight inside; the gate is not part of it."""
        return self.base.materialize_matrix()

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``(x * [|x| > t]) @ W``."""
        if self.batch_shape:
            return jax.vmap(lambda w, x: w.matmul(x, out_dtype=out_dtype))(self, x)
        lead = x.shape[:-2]
        rows, thresholds = x.reshape(-1, x.shape[-1]), self.row_thresholds()
        y = _product(self.base, rows, thresholds, x.dtype if out_dtype is None else out_dtype)
        return y.reshape(*lead, -1, y.shape[-1])

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T``: the gate belongs to the product over K, so there is none here."""
        return self.base.matmul_transposed(x, out_dtype=out_dtype)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Rows or columns of the weight inside."""
        return self.base.take_matrix(axis, indices)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """A slice of the weight inside, under the same gate."""
        base = self.base.slice_matrix(axis, start, size)
        if base is None:
            return None
        norms = self.row_norms
        if norms is not None and axis == "k":
            norms = cut(norms, start, size, norms.ndim - 1)
        return dataclasses.replace(self, base=base, row_norms=norms)

    def split_specs(self, split: Split) -> Any:
        """The weight as it would be split; row norms with its rows."""
        norms = None if self.row_norms is None else split.spec(split.k)
        return type(self)(self.base.split_specs(split), split.spec(), norms)

    def summary(self) -> str:
        """Shape, kind of gate, and the weight inside."""
        gate = "|x|" if self.row_norms is None else "|x|·norm"
        return f"shape={self.shape}, {gate} > t, {self.base!r}"


def _product(
    base: CompressedArray, x: jax.Array, thresholds: jax.Array, out_dtype: Any
) -> jax.Array:
    if isinstance(base, SumArray):
        return add_wide([_product(part, x, thresholds, out_dtype) for part in base.parts])
    rows = _rows(base)
    if rows is not None:
        return sparse_matmul(widened(x, out_dtype), rows, thresholds).astype(out_dtype)
    small = jnp.abs(x).astype(jnp.float32) <= thresholds[None]
    return base.matmul(jnp.where(small, jnp.zeros((), x.dtype), x), out_dtype=out_dtype)


def _rows(base: CompressedArray) -> Any:
    """The weight as the sparse product takes it; None if masking is all that can be done.

    A compiler that splits the work over devices would gather the weight for a kernel or a loop.
    """
    if any(map(is_partitioned_automatically, jax.tree.leaves(base))):
        return None
    match base:
        case DenseArray():
            return base.matrix
        case RowDenseArray():
            return base.blocks
        case RowLutArray():
            return base.row_codes()
        case LutArray() if base.vector_size == 1:
            return base.block_codes()
        case _:
            return None
