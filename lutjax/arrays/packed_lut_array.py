"""Lookup-table codes in the layout of one kernel, for the running program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lutjax.arrays.base import CompressedArray, format_bytes
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.split import Split, explicit_mesh, typed_entries
from lutjax.arrays.typed_shardings import place_with_auto_axes
from lutjax.arrays.view import MATRIX, MatrixView
from pallas_kernels.lut_matmul import (
    PackedWeight,
    packed_columns,
    packed_matmul,
    packed_matmul_grouped,
    zero_of_line,
)
from pallas_kernels.lut_matmul import prepack as prepack_words
from pallas_kernels.manual_axes import is_partitioned_automatically
from pallas_kernels.scales import QuantizedScales, expanded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PackedLutArray(CompressedArray):
    """The weight of a :class:`LutArray` as one kernel reads it, without reordering in every call.

    A layout for the running program on one kind of device, made at load time by
    :func:`lutjax.prepack`. It takes activations of its :attr:`dtype` and has no gradients, and
    cannot be saved: save the canonical array. A weight that was split over a mesh is packed shard
    by shard, and multiplied inside ``jax.shard_map``, where every device has one of them.

    Attributes:
      packed: What the kernel reads; with batch axes, all its arrays lead with them.
      view: How the logical axes map onto ``[K, N]``.
      sharded: Whether two more axes follow the batch axes in all arrays of ``packed``, over the
        shards of K and those of N. Its sizes are then those of a shard.

    >>> import lutjax
    >>> w = lutjax.quantize(jnp.eye(64), bits=4, group_size=32)
    >>> packed = PackedLutArray.of(w, "xla")
    >>> bool((packed.materialize() == w.materialize()).all())
    True
    """

    packed: PackedWeight
    view: MatrixView = dataclasses.field(default=MATRIX, metadata={"static": True})
    sharded: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, array: LutArray, implementation: str, device_kind: str | None = None) -> Self:
        """Repacks a canonical array; one that is split over a mesh shard by shard, where it lies.

        Args:
          array: The weight; its dtype is that of the activations.
          implementation: See :data:`pallas_kernels.lut_matmul.IMPLEMENTATIONS`.
          device_kind: Of the device, e.g. ``"TPU v6 lite"``; None: the one that is compiled for.

        Raises:
          NotImplementedError: If the implementation does not take this weight.
          ValueError: If it is on several devices but not over one mesh, or the shards of K are not
            whole groups.
        """
        static = {
            "implementation": implementation,
            "device_kind": device_kind,
            "zero": zero_of_line(array.lut) if implementation == "mosaic_tpu" else None,
        }
        if len(_devices(array.words)) > 1:
            return cls._of_shards(array, static)
        return cls._packed(array, static)

    @classmethod
    def _packed(cls, array: LutArray, static: dict[str, Any]) -> Self:
        """Repacks a weight that is whole here."""
        k, group_size, dtype = array.matrix_shape[0], array.group_size, array.dtype
        pack = functools.partial(prepack_words, k=k, group_size=group_size, dtype=dtype, **static)
        for _ in array.batch_shape:
            pack = jax.vmap(pack)
        operands = (array.words, array.scales, array.lut, array.offsets)
        return cls(jax.jit(pack)(*operands), array.view)

    @classmethod
    def _of_shards(cls, array: LutArray, static: dict[str, Any]) -> Self:
        """Every device repacks what it has."""
        shardings: Any = jax.tree.map(lambda a: a.sharding, array)
        meshes = {getattr(sharding, "mesh", None) for sharding in jax.tree.leaves(shardings)}
        mesh = meshes.pop()
        if meshes or not isinstance(mesh, Mesh):
            raise ValueError(
                "its parts are on several devices, but not over one mesh; place them with "
                "lutjax.shardings_like"
            )
        count = len(array.batch_shape)
        words = shardings.words.spec
        entries = [*words, *[None] * (array.words.ndim - len(words))]
        k, n = entries[count], entries[count + 2]
        split = Split(tuple(entries[:count]), k, n, mesh.shape)
        if any(isinstance(a, QuantizedScales) for a in (array.scales, array.offsets)):
            array = _with_plain_scales(array, split, mesh)
            shardings = jax.tree.map(lambda a: a.sharding, array)
        specs = array.split_specs(split)

        def is_placed(sharding: Any, spec: PartitionSpec, part: jax.Array) -> bool:
            return sharding.is_equivalent_to(NamedSharding(mesh, spec), part.ndim)

        if not all(jax.tree.leaves(jax.tree.map(is_placed, shardings, specs, array))):
            raise ValueError(
                "its scales and tables are not split as its codes are; place it with "
                "lutjax.shardings_like"
            )
        count_k, rows_of_all = split.shards(k), array.matrix_shape[0]
        rows = rows_of_all // count_k
        if count_k > 1 and array.group_size < rows_of_all and rows % array.group_size:
            raise ValueError(
                f"its {count_k} shards of {rows} rows are not whole groups of {array.group_size}; "
                "split N"
            )

        def one(shard: LutArray) -> PackedLutArray:
            whole = cls._packed(shard, static)
            axes = (count, count + 1)
            packed = jax.tree.map(lambda a: jnp.expand_dims(a, axes), whole.packed)
            return dataclasses.replace(whole, packed=packed, sharded=True)

        pack = jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=split.spec(k, n))
        packed: Self = jax.jit(pack)(array)
        return packed

    @property
    def shards(self) -> tuple[int, int]:
        """The number of shards of K and of N."""
        k, n = self.packed.batch_shape[-2:] if self.sharded else (1, 1)
        return k, n

    def _whole(self) -> Self:
        """Without the axes over shards, of which a device has one."""
        if not self.sharded:
            return self
        if self.shards != (1, 1):
            raise ValueError(
                f"{self!r} is packed for {self.shards[0]} x {self.shards[1]} shards of K and N; "
                "multiply it inside jax.shard_map, or run the canonical parameters"
            )
        axes = (len(self.batch_shape), len(self.batch_shape) + 1)
        packed = jax.tree.map(lambda a: jnp.squeeze(a, axes), self.packed)
        return dataclasses.replace(self, packed=packed, sharded=False)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Dtype of the weight this stands for, and of the activations."""
        return self.packed.dtype

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all data fields share."""
        axes = self.packed.batch_shape
        return axes[:-2] if self.sharded else axes

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N of the stored matrix."""
        k, n = self.shards
        return k * self.packed.k, n * self.packed.n

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense stored matrix, by a product with the identity.

        It is the kernel's: one that keeps the table in the dtype of the activations, as that for
        TPUs does, rounds the entries to it first.
        """
        identity = jnp.eye(self.matrix_shape[0], dtype=self.dtype)
        return self.matmul(jnp.broadcast_to(identity, (*self.batch_shape, *identity.shape)))

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W`` by the kernel whose layout this is, which rounds its float32 sums once."""
        return self._product(x, out_dtype, transpose=False)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T`` by the kernel whose layout this is, which rounds its float32 sums once."""
        return self._product(x, out_dtype, transpose=True)

    def matmul_grouped(
        self,
        x: Float[Array, "t m k"],
        groups: Int[Array, " t"],
        sizes: Int[Array, " t"],
        *,
        out_dtype: Any = None,
    ) -> Float[Array, "t m n"]:
        """Reads the entries where they lie if the layout is a kernel's own."""
        if self.packed.layout is None:
            return super().matmul_grouped(x, groups, sizes, out_dtype=out_dtype)
        self._check(x)
        return packed_matmul_grouped(x, self._whole().packed, groups, sizes, out_dtype=out_dtype)

    def _check(self, x: jax.Array) -> None:
        if x.dtype != self.dtype:
            raise TypeError(
                f"{self!r} is packed for activations of {self.dtype}, got {x.dtype}; cast either "
                "with astype before lutjax.prepack"
            )
        if is_partitioned_automatically(x):
            raise ValueError(
                f"{self!r} is packed for products on one device, but the activations are split "
                "over several; go inside jax.shard_map, or run the canonical parameters"
            )

    def _product(self, x: jax.Array, out_dtype: Any, *, transpose: bool) -> jax.Array:
        self._check(x)
        if self.sharded:
            return self._whole()._product(x, out_dtype, transpose=transpose)
        if self.batch_shape:
            return jax.vmap(lambda w, x: w._product(x, out_dtype, transpose=transpose))(self, x)
        try:
            return packed_matmul(x, self.packed, transpose=transpose, out_dtype=out_dtype)
        except NotImplementedError as error:
            raise NotImplementedError(f"{self!r}: {error}") from error

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array:
        """Dense columns, of which only these are looked up, or rows, by a product with picks."""
        if axis == "n":
            return self.take_columns(indices, self.dtype)
        return self.matmul(jax.nn.one_hot(indices, self.matrix_shape[0], dtype=self.dtype))

    def take_columns(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """Dense columns ``dtype[indices, K]`` of the stored matrix, rounded once."""
        return packed_columns(self._whole().packed, indices, dtype=dtype).T

    def split_specs(self, split: Split) -> Any:
        """Batch axes are split, and the shards that were packed.

        Raises:
          ValueError: If K or N would be split otherwise.
        """
        wanted = split.shards(split.k), split.shards(split.n)
        if wanted != self.shards:
            raise ValueError(
                f"it is packed for {self.shards[0]} x {self.shards[1]} shards of K and N, not "
                f"{wanted[0]} x {wanted[1]}; shard the canonical LutArray before lutjax.prepack"
            )
        if not self.sharded:
            return super().split_specs(split)
        shards = split.spec(split.k, split.n)
        return jax.tree.map(lambda a: shards, self)

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes and shards are split."""
        entries, count = typed_entries(self.packed.scales), len(self.batch_shape)
        k, n = entries[count : count + 2] if self.sharded else (None, None)
        return entries[:count], k, n

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

    def summary(self) -> str:
        """Shape, dtype, bits, kernel and bytes."""
        return (
            f"shape={self.shape}, {self.dtype}, {self.packed.bits} bits, "
            f"{self.packed.implementation}, {format_bytes(self.nbytes)}"
        )


def _devices(array: Any) -> Collection[Any]:
    """The devices that an array is on; none for one that is traced."""
    return getattr(getattr(array, "sharding", None), "device_set", ())


def _with_plain_scales(array: LutArray, split: Split, mesh: Mesh) -> LutArray:
    """Scales expanded and split as the codes are, which blocks of quantised ones need not be."""

    def place(plain: LutArray) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), plain.split_specs(split))

    if explicit_mesh(array) is not None:
        return place_with_auto_axes(expanded, [array], place)
    shardings = place(jax.eval_shape(expanded, array))
    return jax.jit(expanded, out_shardings=shardings)(array)
