"""What every compressed array has in common."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lutjax.arrays.grouped import entry, map_tiles
from lutjax.arrays.split import Split, typed_entries
from lutjax.arrays.view import MatrixView


class CompressedArray(abc.ABC):
    """A pytree node that stands where a dense weight stood.

    It behaves as a matrix ``[*batch, K, N]`` with K the contraction axis, seen through a
    :class:`MatrixView` that gives it its logical ``shape``. Subclasses are frozen dataclasses
    registered with :func:`jax.tree_util.register_dataclass`; every data field carries the same
    leading batch axes, so ``scan``, ``vmap`` and slicing a stacked axis need no special care.

    There is no ``__jax_array__``: it would turn the weight dense without a word. Use
    :meth:`matmul`, :func:`lutjax.lift` or, knowingly, :meth:`materialize`.
    """

    # What a subclass provides, as fields or properties.

    view: MatrixView
    """How the logical axes map onto the stored matrix."""

    dtype: np.dtype
    """The dtype of the weight that this array stands for."""

    __array_ufunc__: ClassVar[None] = None  # NumPy leaves ``x @ W`` to the weight

    trains: ClassVar[bool] = False
    """Whether :func:`lutjax.partition` lets its floating-point arrays learn by default."""

    observes: ClassVar[bool] = False
    """Whether its products look at their input by way of JAX's own derivative; ``lift`` then leaves
    out the derivative rules of functions that it enters."""

    @property
    @abc.abstractmethod
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that all data fields share."""

    @property
    @abc.abstractmethod
    def matrix_shape(self) -> tuple[int, int]:
        """K and N of the stored matrix."""

    @abc.abstractmethod
    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense stored matrix, in :attr:`dtype`."""

    @abc.abstractmethod
    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W`` on the stored matrix.

        With batch axes, ``x`` leads with the same ones; without, it may lead with any.

        Args:
          x: Activations.
          out_dtype: Of the result; by default that of ``x``. One with more bits gives sums that are
            rounded less often; whether ``x`` is widened for it is up to the array.
        """

    @abc.abstractmethod
    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T`` on the stored matrix; see :meth:`matmul`."""

    def matmul_grouped(
        self,
        x: Float[Array, "t m k"],
        groups: Int[Array, " t"],
        sizes: Int[Array, " t"],
        *,
        out_dtype: Any = None,
    ) -> Float[Array, "t m n"]:
        """``x[i] @ W[groups[i]]`` on a weight with one batch axis, such as one of experts.

        Args:
          x: Tiles of rows; those from ``sizes[i]`` on only fill a tile and are zeros.
          groups: The entry of the batch axis that each tile meets, in range.
          sizes: How many rows of each tile count.
          out_dtype: Of the result; see :meth:`matmul`.
        """
        return map_tiles(
            lambda group, rows: entry(self, group).matmul(rows, out_dtype=out_dtype),
            self,
            x,
            groups,
            sizes,
        )

    # What one may have to say differently.

    def with_view(self, view: MatrixView) -> Self:
        """The same data under another view."""
        return dataclasses.replace(self, view=view)  # type: ignore[type-var]

    def astype(self, dtype: Any) -> Self:
        """The same data standing for a weight of another dtype, which is floating point."""
        dtype = np.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{self!r} cannot stand for {dtype} numbers; materialize() it first")
        return dataclasses.replace(self, dtype=dtype)  # type: ignore[type-var]

    def summary(self) -> str:
        """What :func:`repr` says of it in parentheses; never the arrays."""
        return f"shape={self.shape}, {self.dtype}, {format_bytes(self.nbytes)}"

    def take_matrix(self, axis: str, indices: jax.Array) -> jax.Array | None:
        """Dense rows (``axis="k"``) or columns (``"n"``) of a stored matrix without batch axes.

        Only those are decompressed; None if that is not possible. Indices must be in range.

        Returns:
          ``dtype[len(indices), N]`` or ``dtype[len(indices), K]``.
        """
        return None

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Rows (``axis="k"``) or columns (``"n"``) of the stored matrix.

        ``start`` is an int, or a traced integer that is in range. None if the slice is packed
        together with others and cannot be cut out.
        """
        return None

    def split_specs(self, split: Split) -> Any:
        """Partition specs of the data fields for a stored matrix that is split over a mesh.

        By default, only batch axes are split.

        Raises:
          ValueError: If the data cannot be split that way.
        """
        return jax.tree.map(lambda a: split.spec(*[None] * (a.ndim - len(split.batch))), self)

    def typed_spec(self) -> tuple[tuple[Any, ...], Any, Any]:
        """The explicit mesh axes over which batch axes, K and N are split; none by default."""
        return (None,) * len(self.batch_shape), None, None

    # What follows from it.

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, that of the dense weight."""
        return (*self.batch_shape, *self.view.shape(*self.matrix_shape))

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.batch_shape) + len(self.view.order)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: codes, scales, tables, factors."""
        return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return 8 * self.nbytes / self.size

    @property
    def T(self) -> Self:
        """The weight with its logical axes reversed; no data moves.

        Raises:
          ValueError: With batch axes.
        """
        return self.transpose(range(self.ndim)[::-1])

    def materialize(self) -> jax.Array:
        """The dense weight ``dtype[*shape]``, sharded as it is."""
        from lutjax.arrays.typed_shardings import logical_sharding, run_with_auto_axes

        def dense(weight: CompressedArray) -> jax.Array:
            return weight.view.from_matrix(weight.materialize_matrix())

        sharding = logical_sharding(self)
        return dense(self) if sharding is None else run_with_auto_axes(dense, [self], sharding)

    def take(self, indices: jax.Array) -> jax.Array:
        """``W[indices]``: dense slices along the first logical axis, ``[*indices.shape, ...]``.

        Only those are decompressed where the first axis is all of K or all of N; otherwise the
        whole weight is.
        """
        rows = self.take_slices(indices)
        return jnp.take(self.materialize(), indices, axis=0, mode="clip") if rows is None else rows

    def take_slices(self, indices: jax.Array) -> jax.Array | None:
        """Like :meth:`take`, but None where the whole weight would have to be dense."""
        if self.batch_shape:
            return None
        found = self.outer_axis(0)
        if found is None or found[1] != 1:
            return None
        side, rest = found[0], self.shape[1:]
        flat = jnp.clip(indices.reshape(-1), 0, self.shape[0] - 1)
        rows = self.take_matrix(side, flat)
        if rows is None:
            return None
        # The other side's factors, in stored order, then as the view has them.
        axes = self.view.n_axes if side == "k" else self.view.k_axes
        rows = rows.reshape(-1, *(self.shape[axis] for axis in axes))
        units = [axis for axis in range(1, self.ndim) if axis not in axes]
        order = [0, *(1 + axes.index(a) for a in range(1, self.ndim) if a not in units)]
        return rows.transpose(order).reshape(*indices.shape, *rest)

    def outer_axis(self, axis: int) -> tuple[str, int] | None:
        """The side of the stored matrix of which a logical axis is the outermost factor.

        Args:
          axis: A logical axis, batch axes not counted.

        Returns:
          ``("k" or "n", size of the factors inside it)``: slicing the axis slices that side. None
          if another factor is outside it.
        """
        sizes = self.shape[len(self.batch_shape) :]
        for side, axes in (("k", self.view.k_axes), ("n", self.view.n_axes)):
            if axis in axes:
                place = axes.index(axis)
                if math.prod(sizes[a] for a in axes[:place]) > 1:
                    return None
                return side, math.prod(sizes[a] for a in axes[place + 1 :])
        raise ValueError(f"axis {axis} is not one of the {len(sizes)} axes of {self!r}")

    def deriving(self, axis: int | None = None) -> Self:
        """The same weight whose view derives the size of ``axis`` from the data.

        Args:
          axis: A logical axis, batch axes not counted; None for the outermost factors.
        """
        return self.with_view(self.view.deriving(self.shape[len(self.batch_shape) :], axis))

    def slice_axis(self, axis: int, start: Any, size: int) -> Self | None:
        """A slice of one logical axis, batch axes not counted; see :meth:`slice_matrix`.

        None if the weight would have to be dense.
        """
        found = self.outer_axis(axis)
        if found is None or not size:
            return None
        side, inner = found
        part = self.deriving(axis).slice_matrix(side, start * inner, size * inner)
        return None if part is None else part.deriving()

    def transpose(self, permutation: Sequence[int]) -> Self:
        """The weight with permuted logical axes; no data moves.

        Raises:
          ValueError: If a batch axis would leave its place.
        """
        batch = len(self.batch_shape)
        if tuple(permutation[:batch]) != tuple(range(batch)):
            raise ValueError(
                f"permutation {tuple(permutation)} moves one of the {batch} leading batch axes of "
                f"{self}; materialize() it first"
            )
        return self.with_view(self.view.transpose([p - batch for p in permutation[batch:]]))

    def reshape(self, shape: Sequence[int]) -> Self | None:
        """The weight in another logical shape without moving data, or None if impossible.

        One of the sizes may be -1, which is what remains.
        """
        shape = tuple(self.size // -math.prod(shape) if s == -1 else s for s in shape)
        count = len(self.batch_shape)
        splits = sorted(range(len(shape) + 1), key=lambda split: abs(split - count))
        inner = self.shape[count:]
        for split in splits:
            if math.prod(shape[:split]) != math.prod(self.batch_shape):
                continue
            view = self.view.reshape(inner, shape[split:])
            if view is not None:
                return self.with_view(view)._reshape_batch(shape[:split])
        return None

    def _reshape_batch(self, shape: tuple[int, ...]) -> Self:
        count = len(self.batch_shape)
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[count:]), self)

    def __repr__(self) -> str:
        """The class and :meth:`summary`."""
        try:
            return f"{type(self).__name__}({self.summary()})"
        except (AttributeError, IndexError, TypeError):  # placeholders instead of arrays
            fields = dataclasses.fields(self)  # type: ignore[arg-type]
            values = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields)
            return f"{type(self).__name__}({values})"

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        """No array of its codes: NumPy would make one of objects."""
        raise TypeError(f"{self!r} is compressed; materialize() gives the dense weight")

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """``x @ W`` for a weight whose logical axes are ``(K, N)``, or ``(N, K)`` stored."""
        from lutjax.arrays.typed_shardings import logical_sharding, run_with_auto_axes

        if self.batch_shape or len(self.view.order) != 2:
            raise ValueError(f"x @ weight needs a matrix, got {self}; use jnp.einsum inside lift")
        x = jnp.asarray(x)
        stored = self.view.k_axes == (0,)
        product = type(self).matmul if stored else type(self).matmul_transposed
        sharding = logical_sharding(self)
        if sharding is None:
            return product(self, x)
        spec = PartitionSpec(*typed_entries(x)[:-1], sharding.spec[1])
        return run_with_auto_axes(product, [self, x], NamedSharding(sharding.mesh, spec))


def cut(a: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """A slice of one axis, at a place that is known now or traced."""
    if isinstance(start, int):
        return jax.lax.slice_in_dim(a, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=axis)


def is_compressed(x: Any) -> bool:
    """Whether ``x`` is a compressed array; use it as ``is_leaf`` of ``jax.tree`` functions.

    >>> is_compressed(jnp.zeros((2, 2)))
    False
    """
    return isinstance(x, CompressedArray)


def has_compressed(params: Any) -> bool:
    """Whether any leaf of a pytree is a compressed array.

    >>> has_compressed({"kernel": jnp.zeros((2, 2))})
    False
    """
    return any(map(is_compressed, jax.tree.leaves(params, is_leaf=is_compressed)))


def format_bytes(nbytes: float) -> str:
    """A size for people, in powers of 1000.

    >>> format_bytes(56_400_000)
    '56.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
