"""A weight that one implementation reads without reordering, and what a layout of its own offers.

Implementations with such a layout say how they pack, multiply and look up in a module called
``<implementation>_packed``; all others read the canonical words.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ("mosaic_gpu", "mosaic_tpu")
"""Implementations with a layout of their own."""

PACKED_ROWS = 16
"""Rows of ``x`` that a layout is decided for; it serves any number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight ``[K, N]`` that one implementation reads without reordering.

    Attributes:
      planes: Packed codes in the implementation's layout (canonical words for those without one).
      scales: ``[ceil(K / G), N]``, or the implementation's form of them.
      table: ``float32[T, 2**bits, p]``, or the implementation's form of it.
      lut: ``[T, 2**bits, p]`` that ``scales`` are for; :func:`packed_columns` reads it.
      offsets: ``[ceil(K / G), N]``, or None.
      implementation: Whose layout it is.
      dtype: Of the activations; a table may be stored in it.
      k: The number of rows K.
      n: The number of columns N.
      bits: Bits a code.
      group_size: Rows that share a scale.
      p: Rows that share a code.
      layout: What decided the order of the planes; None for canonical words.
    """

    planes: tuple
    scales: jax.Array
    table: jax.Array
    lut: jax.Array
    offsets: jax.Array | None
    implementation: str = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    p: int = dataclasses.field(metadata={"static": True})
    layout: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Axes that all arrays lead with, which ``jax.vmap`` over :func:`prepack` makes."""
        return self.lut.shape[:-3]

    @property
    def groups(self) -> int:
        """The number of groups of a column."""
        return -(-self.k // self.group_size)

    def words_like(self) -> jax.ShapeDtypeStruct:
        """The canonical words, of which the sizes of a product are known."""
        blocks = -(-self.k // (8 * self.p))
        return jax.ShapeDtypeStruct((blocks, self.bits, self.n), jnp.uint8)


class Layout(Protocol):
    """What the module of an implementation with a layout of its own offers.

    Products are without offsets, and without the rows and columns of padding.
    """

    def reorder(
        self, weight: PackedWeight, *, device_kind: str | None, zero: int | None
    ) -> PackedWeight:
        """A weight of canonical words in this layout; see ``prepack`` for the arguments."""

    def reason_against_transposed(self, weight: PackedWeight) -> str | None:
        """Why the kernel has no transposed product for the weight, or None."""

    def product(
        self, x: jax.Array, weight: PackedWeight, *, transpose: bool, out_dtype: Any, interpret: Any
    ) -> jax.Array:
        """``x @ W`` or ``x @ W.T`` for ``x`` of two axes, in ``out_dtype`` or float32."""

    def product_grouped(
        self,
        x: jax.Array,
        weight: PackedWeight,
        groups: jax.Array,
        sizes: jax.Array,
        *,
        out_dtype: Any,
        interpret: Any,
    ) -> jax.Array:
        """``x[i] @ W[groups[i]]``, of any value in rows that do not count."""

    def canonical_columns(
        self, weight: PackedWeight, columns: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Canonical words of some columns, and their scales, groups of padding at the end."""


def layout_of(implementation: str) -> Layout:
    """The module that knows the layout, imported on first use."""
    module: Any = importlib.import_module(f"pallas_kernels.lut_matmul.{implementation}_packed")
    return module
