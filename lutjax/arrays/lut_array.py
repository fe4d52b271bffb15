"""A weight as packed codes of a lookup table, with a scale for each group."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lutjax.arrays.base import CompressedArray, cut, format_bytes
from lutjax.arrays.scales import split_scales
from lutjax.arrays.split import Split, typed_entries
from lutjax.arrays.view import MATRIX, MatrixView
from lutjax.dtypes import widened
from lutjax.packing import BLOCK, unpack
from pallas_kernels.lut_matmul import dequantize, lut_matmul, take_columns
from pallas_kernels.manual_axes import is_partitioned_automatically
from pallas_kernels.scales import QuantizedScales, expanded, some_columns
from pallas_kernels.sparse_matmul import BlockCodes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LutArray(CompressedArray):
    """A matrix of lookup-table codes: ``W[k, n] = lut[code[k, n]] * scale[k // G, n] (+ offset)``.

    Made by :func:`lutjax.quantize`; see :mod:`pallas_kernels.layout` for the packing.

    Attributes:
      words: ``uint8[*batch, ceil(K / (8 p)), bits, N]``, packed codes.
      scales: ``[*batch, ceil(K / G), N]``, or :class:`QuantizedScales` of that shape.
      lut: ``float32[*batch, T, 2**bits, p]``; T = 1 or N tables, p consecutive rows share a code.
      offsets: Like ``scales``, or None.
      group_size: G, rows that share a scale; the last group may be shorter.
      padding: Rows that pad K to a whole number of packed blocks.
      dtype: Dtype of the weight this stands for.
      view: How the logical axes map onto ``[K, N]``.

    Source: FLUTE (arXiv 2407.10960).

    >>> import lutjax
    >>> w = lutjax.quantize(jnp.eye(64), bits=4, group_size=32)
    >>> w
    LutArray(shape=(64, 64), float32, 4 bits, group_size=32, 2.4 kB)
    >>> bool((jnp.eye(64) @ w == w.materialize()).all())
    True
    """

    words: UInt8[Array, "..."]
    scales: Float[Array, "..."] | QuantizedScales
    lut: Float[Array, "..."]
    offsets: Float[Array, "..."] | QuantizedScales | None
    group_size: int = dataclasses.field(metadata={"static": True})
    padding: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.words.shape[-2]

    @property
    def vector_size(self) -> int:
        """Consecutive rows p that share a code."""
        return self.lut.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all data fields share."""
        return tuple(self.words.shape[:-3])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N of the stored matrix."""
        rows = self.words.shape[-3] * BLOCK * self.vector_size - self.padding
        return rows, self.words.shape[-1]

    def codes(self) -> UInt8[Array, "*batch k n"]:
        """The unpacked codes, ``uint8[*batch, K / p, N]``."""
        return unpack(self.words, -(-self.matrix_shape[0] // self.vector_size))

    def block_codes(self) -> BlockCodes:
        """What the sparse product takes; without batch axes, and for single rows a code."""
        parts = self.words, self.scales, self.lut, self.offsets
        return BlockCodes(*parts, self.matrix_shape[0], self.group_size)

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense stored matrix, in :attr:`dtype`."""
        return dequantize(
            self.words,
            expanded(self.scales),
            self.lut,
            expanded(self.offsets),
            k=self.matrix_shape[0],
            group_size=self.group_size,
            dtype=self.dtype,
        )

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W`` with the fused kernel."""
        return self._product(x, out_dtype, transpose=False)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T`` with the fused kernel."""
        return self._product(x, out_dtype, transpose=True)

    # Weights of one shape share a trace: a decoder has hundreds of them.
    @functools.partial(jax.jit, static_argnames=("out_dtype", "transpose"))
    def _product(self, x: jax.Array, out_dtype: Any, *, transpose: bool) -> jax.Array:
        if self.batch_shape:
            return jax.vmap(lambda w, x: w._product(x, out_dtype, transpose=transpose))(self, x)
        y = lut_matmul(
            widened(x, out_dtype),
            self.words,
            self.scales,
            self.lut,
            self.offsets,
            k=self.matrix_shape[0],
            group_size=self.group_size,
            transpose=transpose,
            implementation="xla" if is_partitioned_automatically(self.words) else None,
        )
        return y.astype(x.dtype if out_dtype is None else out_dtype)

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array:
        """Dense rows or columns; only those are dequantised."""
        if axis == "n":
            take = functools.partial(take_columns, columns=indices)
            part = dataclasses.replace(
                self,
                words=take(self.words),
                scales=some_columns(self.scales, take),
                lut=jnp.take(self.lut, indices, axis=-3) if self._tables_per_column else self.lut,
                offsets=some_columns(self.offsets, take),
            )
            return part.materialize_matrix().T
        place, within = indices // self.vector_size, indices % self.vector_size
        blocks = jnp.take(self.words, place // BLOCK, axis=0, mode="clip")
        codes = unpack(blocks[:, None])  # [indices, 8, N]
        codes = jnp.take_along_axis(codes, (place % BLOCK)[:, None, None], axis=-2)[:, 0]
        table = jnp.broadcast_to(self.lut, (self.words.shape[-1], *self.lut.shape[1:]))
        column = jnp.arange(self.words.shape[-1])[None, :]
        values = table[column, codes.astype(jnp.int32), within[:, None]]
        group = indices // self.group_size
        rows = values * expanded(self.scales)[group].astype(jnp.float32)
        if self.offsets is not None:
            rows += expanded(self.offsets)[group].astype(jnp.float32)
        return rows.astype(self.dtype)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Rows at group and block boundaries, or any columns, of the stored matrix."""
        k = self.matrix_shape[0]
        if axis == "n":
            part = functools.partial(cut, start=start, size=size)
            columns = functools.partial(part, axis=-1)
            return dataclasses.replace(
                self,
                words=columns(self.words),
                scales=some_columns(self.scales, columns),
                lut=part(self.lut, axis=-3) if self._tables_per_column else self.lut,
                offsets=some_columns(self.offsets, columns),
            )
        if not isinstance(start, int):  # it may lie within a group or a block
            return None
        rows, group = BLOCK * self.vector_size, self.group_size
        to_the_end = start + size == k
        if start % rows or start % group or (not to_the_end and (size % rows or size % group)):
            return None
        blocks = slice(start // rows, -(-(start + size) // rows))
        groups = slice(start // group, -(-(start + size) // group))
        return dataclasses.replace(
            self,
            words=self.words[..., blocks, :, :],
            scales=expanded(self.scales)[..., groups, :],
            offsets=None if self.offsets is None else expanded(self.offsets)[..., groups, :],
            padding=self.padding if to_the_end else 0,
        )

    def split_specs(self, split: Split) -> Any:
        """Codes are split by rows at whole blocks and by columns; so are scales that fit."""
        k, n = self.matrix_shape
        shards = split.shards(split.k)
        rows = k // shards
        if k % shards or (rows % (BLOCK * self.vector_size) and shards > 1):
            raise ValueError(
                f"its K={k} rows do not split into {shards} whole blocks of "
                f"{BLOCK * self.vector_size}; shard N, or over fewer devices"
            )
        if n % split.shards(split.n):
            raise ValueError(f"its N={n} columns do not split into {split.shards(split.n)}")
        groups_split = split.k if rows % self.group_size == 0 else None
        return dataclasses.replace(
            self,
            words=split.spec(split.k, None, split.n),
            scales=split_scales(self.scales, split, groups_split),
            lut=split.spec(split.n if self._tables_per_column else None, None, None),
            offsets=split_scales(self.offsets, split, groups_split),
        )

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes, K and N are split."""
        *batch, k, _, n = typed_entries(self.words)
        return tuple(batch), k, n

    @property
    def _tables_per_column(self) -> bool:
        return self.lut.shape[-3] > 1

    def summary(self) -> str:
        """Shape, dtype, bits, group size and bytes."""
        groups = "column" if self.group_size >= self.matrix_shape[0] else self.group_size
        extra = "".join(
            f", {text}"
            for text, present in (
                ("offsets", self.offsets is not None),
                (f"vectors of {self.vector_size}", self.vector_size > 1),
                ("a table per column", self._tables_per_column),
                ("quantised scales", isinstance(self.scales, QuantizedScales)),
            )
            if present
        )
        return (
            f"shape={self.shape}, {self.dtype}, {self.bits} bits, group_size={groups}{extra}, "
            f"{format_bytes(self.nbytes)}"
        )
