"""How the logical axes of a weight map onto the matrix it is stored as."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """The logical axes of a weight as factors of the rows K and columns N of its stored matrix.

    A compressed weight is stored as ``[*batch, K, N]`` with K the contraction axis. Its logical
    shape is ``[*batch, *axes]``, where each of the axes is a factor of K or of N. So a transposed
    weight, a multi-head kernel ``[D, H, d]`` (K = D, N = H d) or ``[H, d, D]`` (K = H d, N = D) are
    views of the same thing, and transposing or reshaping one moves no data.

    Attributes:
      k: Sizes of the factors of K, outermost first. One of them, the outermost that is not 1, is
        -1: it is derived from the data, which keeps the view true when K is sharded or sliced.
      n: The same for N.
      order: For each logical axis, which of the factors ``(*k, *n)`` it is.

    >>> view = MatrixView.of((512, 8, 64), contract=(0,))
    >>> view.shape(512, 512)
    (512, 8, 64)
    >>> view.transpose((1, 2, 0)).shape(512, 512)
    (8, 64, 512)
    """

    k: tuple[int, ...] = (-1,)
    n: tuple[int, ...] = (-1,)
    order: tuple[int, ...] = (0, 1)

    @classmethod
    def of(
        cls, shape: Sequence[int], contract: Sequence[int], rest: Sequence[int] | None = None
    ) -> MatrixView:
        """The view of a weight of logical ``shape`` whose axes ``contract`` are summed over.

        The axes of K are those of ``contract``, outermost first; those of N are ``rest``, by
        default in the order of ``shape``.
        """
        if rest is None:
            rest = [axis for axis in range(len(shape)) if axis not in contract]
        factors = [*contract, *rest]
        return _make(
            [shape[a] for a in contract],
            [shape[a] for a in rest],
            tuple(factors.index(axis) for axis in range(len(shape))),
        )

    def shape(self, k: int, n: int) -> tuple[int, ...]:
        """The logical shape, without batch axes, of a stored ``[K, N]`` matrix."""
        factors = (*_fill(self.k, k), *_fill(self.n, n))
        return tuple(factors[i] for i in self.order)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """K and N of the stored matrix of a logical ``shape``, batch axes not counted.

        >>> MatrixView.of((512, 8, 64), contract=(0,)).matrix_shape((512, 8, 64))
        (512, 512)
        """
        return (
            math.prod(shape[axis] for axis in self.k_axes),
            math.prod(shape[axis] for axis in self.n_axes),
        )

    @property
    def k_axes(self) -> tuple[int, ...]:
        """Logical axes (batch axes not counted) that make up K, outermost first."""
        return tuple(self.order.index(i) for i in range(len(self.k)))

    @property
    def n_axes(self) -> tuple[int, ...]:
        """Logical axes (batch axes not counted) that make up N, outermost first."""
        return tuple(self.order.index(len(self.k) + i) for i in range(len(self.n)))

    def transpose(self, permutation: Sequence[int]) -> MatrixView:
        """The view after permuting the logical axes, batch axes not counted."""
        return dataclasses.replace(self, order=tuple(self.order[p] for p in permutation))

    def deriving(self, shape: Sequence[int], axis: int | None = None) -> MatrixView:
        """The same view with another factor derived from the data.

        Args:
          shape: The present logical shape, batch axes not counted.
          axis: The axis whose size will change with the data; None for the outermost factors.

        >>> MatrixView.of((8, 4, 64), contract=(0,)).deriving((8, 1, 64), axis=2)
        MatrixView(k=(-1,), n=(1, -1), order=(0, 1, 2))
        """
        sizes = [shape[self.order.index(factor)] for factor in range(len(self.order))]
        count = len(self.k)
        factor = -1 if axis is None else self.order[axis]
        return dataclasses.replace(
            self,
            k=_derived(sizes[:count], factor if 0 <= factor < count else None),
            n=_derived(sizes[count:], factor - count if factor >= count else None),
        )

    def reshape(self, old: Sequence[int], new: Sequence[int]) -> MatrixView | None:
        """The view after a reshape of the logical axes, or None where it would mix K with N.

        Args:
          old: The present logical shape, batch axes not counted.
          new: The new one; the same number of elements.
        """
        # Neighbouring axes that are also stored as neighbours form a run, which can be cut anew.
        runs: list[_Run] = []
        last = -1
        for factor, size in zip(self.order, old, strict=True):
            if size == 1:
                continue
            same_side = (factor >= len(self.k)) == (last >= len(self.k))
            if runs and factor == last + 1 and same_side:
                runs[-1] = dataclasses.replace(runs[-1], size=runs[-1].size * size)
            else:
                runs.append(_Run(factor, factor >= len(self.k), size))
            last = factor
        pieces: list[tuple[float, int, bool, int]] = []  # first factor, place, is N, size
        remaining = list(runs)
        left = remaining[0].size if remaining else 1
        for axis, size in enumerate(new):
            if size == 1:
                pieces.append((math.inf, axis, True, 1))  # a unit axis may count as part of N
                continue
            if not remaining or left % size:
                return None
            pieces.append((remaining[0].factor, axis, remaining[0].is_n, size))
            left //= size
            if left == 1:
                remaining.pop(0)
                left = remaining[0].size if remaining else 1
        if remaining:
            return None
        stored = sorted(pieces, key=lambda p: (p[2], p[0], p[1]))
        return _make(
            [size for *_, is_n, size in stored if not is_n],
            [size for *_, is_n, size in stored if is_n],
            tuple(stored.index(p) for p in pieces),
        )

    def to_matrix(self, x: jax.Array, batch_ndim: int = 0) -> jax.Array:
        """Brings a logical array ``[*batch, *axes]`` into the stored form ``[*batch, K, N]``."""
        batch, inner = x.shape[:batch_ndim], x.shape[batch_ndim:]
        order = (*range(batch_ndim), *(batch_ndim + a for a in (*self.k_axes, *self.n_axes)))
        return x.transpose(order).reshape(*batch, *self.matrix_shape(inner))

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Brings a stored matrix ``[*batch, K, N]`` into the logical form ``[*batch, *axes]``."""
        *batch, k, n = matrix.shape
        factors = matrix.reshape(*batch, *_fill(self.k, k), *_fill(self.n, n))
        lead = tuple(range(len(batch)))
        return factors.transpose((*lead, *(len(batch) + f for f in self.order)))


MATRIX = MatrixView()
"""The plain view of a matrix: logical axes ``(K, N)``."""


def _fill(sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
    if -1 not in sizes:
        return sizes
    known = math.prod(s for s in sizes if s != -1)
    return tuple(total // known if s == -1 else s for s in sizes)


def _make(k: list[int], n: list[int], order: tuple[int, ...]) -> MatrixView:
    return MatrixView(_derived(k), _derived(n), order)


def _derived(sizes: Sequence[int], place: int | None = None) -> tuple[int, ...]:
    """Sizes with -1 for one of them, by default the outermost that is not 1."""
    if place is None:
        place = next((i for i, size in enumerate(sizes) if size != 1), 0)
    return tuple(-1 if i == place else size for i, size in enumerate(sizes))


@dataclasses.dataclass(frozen=True)
class _Run:
    factor: int
    is_n: bool
    size: int
