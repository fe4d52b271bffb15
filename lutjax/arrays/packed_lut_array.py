"""Lookup-table codes in the layout of one kernel, for the running program."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lutjax.arrays.base import CompressedArray, format_bytes
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.split import Split, is_partitioned_automatically
from lutjax.arrays.view import MATRIX, MatrixView
from pallas_kernels.lut_matmul import PackedWeight, packed_matmul, packed_matmul_grouped
from pallas_kernels.lut_matmul import prepack as prepack_words


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["view"])
@dataclasses.dataclass(frozen=True)
class PackedLutArray(CompressedArray):
    """The weight of a :class:`LutArray` as one kernel reads it, without reordering in every call.

    A layout for the running program on one kind of device, made at load time by
    :func:`lutjax.prepack`. It takes activations of its :attr:`dtype` and has no gradients; it
    cannot be saved or split over a mesh: save and shard the canonical array.

    Attributes:
      packed: What the kernel reads; with batch axes, all its arrays lead with them.
      view: How the logical axes map onto ``[K, N]``.

    >>> import lutjax
    >>> w = lutjax.quantize(jnp.eye(64), bits=4, group_size=32)
    >>> packed = PackedLutArray.of(w, "xla")
    >>> bool((packed.materialize() == w.materialize()).all())
    True
    """

    packed: PackedWeight
    view: MatrixView = MATRIX

    @classmethod
    def of(cls, array: LutArray, implementation: str, device_kind: str | None = None) -> Self:
        """Repacks a canonical array.

        Args:
          array: The weight; its dtype is that of the activations.
          implementation: See :data:`pallas_kernels.lut_matmul.IMPLEMENTATIONS`.
          device_kind: Of the device, e.g. ``"TPU v6 lite"``; None: the one that is compiled for.

        Raises:
          NotImplementedError: If the implementation does not take this weight.
        """
        pack = functools.partial(
            prepack_words,
            k=array.matrix_shape[0],
            group_size=array.group_size,
            implementation=implementation,
            dtype=array.dtype,
            device_kind=device_kind,
        )
        for _ in array.batch_shape:
            pack = jax.vmap(pack)
        operands = (array.words, array.expanded_scales(), array.lut, array.offsets)
        return cls(jax.jit(pack)(*operands), array.view)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Dtype of the weight this stands for, and of the activations."""
        return self.packed.dtype

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all data fields share."""
        return self.packed.batch_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N of the stored matrix."""
        return self.packed.k, self.packed.n

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense stored matrix, by a product with the identity.

        It is the kernel's: one that keeps the table in the dtype of the activations, as that for
        TPUs does, rounds the entries to it first.
        """
        identity = jnp.eye(self.packed.k, dtype=self.dtype)
        return self.matmul(jnp.broadcast_to(identity, (*self.batch_shape, *identity.shape)))

    def matmul(self, x: Float[Array, "*batch m k"]) -> Float[Array, "*batch m n"]:
        """``x @ W`` by the kernel whose layout this is."""
        return self._product(x, transpose=False)

    def matmul_transposed(self, x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m k"]:
        """``x @ W.T`` by the kernel whose layout this is."""
        return self._product(x, transpose=True)

    def matmul_grouped(
        self, x: Float[Array, "t m k"], groups: Int[Array, " t"], sizes: Int[Array, " t"]
    ) -> Float[Array, "t m n"]:
        """Reads the entries where they lie if the layout is a kernel's own."""
        if not self.packed.padded:
            return super().matmul_grouped(x, groups, sizes)
        self._check(x)
        return packed_matmul_grouped(x, self.packed, groups, sizes)

    def _check(self, x: jax.Array) -> None:
        if x.dtype != self.dtype:
            raise TypeError(
                f"{self!r} is packed for activations of {self.dtype}, got {x.dtype}; cast either "
                "with astype before lutjax.prepack"
            )
        if is_partitioned_automatically(x):
            raise ValueError(
                f"{self!r} is packed for one device, but the activations are split over several; "
                "run the canonical parameters"
            )

    def _product(self, x: jax.Array, *, transpose: bool) -> jax.Array:
        self._check(x)
        if self.batch_shape:
            return jax.vmap(lambda w, x: w._product(x, transpose=transpose))(self, x)
        try:
            return packed_matmul(x, self.packed, transpose=transpose)
        except NotImplementedError as error:
            raise NotImplementedError(f"{self!r}: {error}") from error

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array:
        """Dense rows or columns, by a product with rows of the identity."""
        k, n = self.matrix_shape
        picks = jax.nn.one_hot(indices, k if axis == "k" else n, dtype=self.dtype)
        return self._product(picks, transpose=axis == "n")

    def split_specs(self, split: Split) -> Any:
        """Only batch axes are split.

        Raises:
          ValueError: If K or N would be.
        """
        if split.shards(split.k) * split.shards(split.n) > 1:
            raise ValueError("it is packed for one device; shard the canonical LutArray instead")
        return super().split_specs(split)

    def with_view(self, view: MatrixView) -> Self:
        """The same data under another view."""
        return dataclasses.replace(self, view=view)

    def astype(self, dtype: Any) -> Self:
        """Itself; the layout depends on the dtype.

        Raises:
          TypeError: For another dtype.
        """
        if np.dtype(dtype) != self.dtype:
            raise TypeError(
                f"{self!r} is packed for {self.dtype}, not {np.dtype(dtype)}; use astype before "
                "lutjax.prepack"
            )
        return self

    def __repr__(self) -> str:
        """Shape, dtype, bits, group size and bytes; never the arrays."""
        try:
            return (
                f"PackedLutArray(shape={self.shape}, {self.dtype}, {self.packed.bits} bits, "
                f"{self.packed.implementation}, {format_bytes(self.nbytes)})"
            )
        except (AttributeError, IndexError, TypeError):  # placeholders instead of arrays
            return f"PackedLutArray(packed={self.packed!r})"
