"""What a linear map is: a rule (:class:`LinearMap`), and one weight's map (:class:`BoundMap`)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lutjax.arrays import MatrixView
from lutjax.arrays.view import MATRIX
from lutjax.linear_maps.dimension_numbers import DimensionNumbers, matrix_view


class BoundMap(abc.ABC):
    """A linear map `S` from gradients of one weight to a smaller (latent) space, and its transpose.

    Bound maps are pytrees of arrays, so they travel through ``jit`` and into checkpoints. A weight
    may have leading batch axes; each index of them has a map of its own.
    """

    @abc.abstractmethod
    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
        """`S g`: the gradient in the latent space."""

    @abc.abstractmethod
    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:
        """`S^T r`: the transpose, back to the weight's shape."""

    def adapter(
        self, weight: Float[Array, "..."], latent: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """`W_0 + S^T latent`: the weight that the map's dual adapter stands for."""
        return weight + self.up(latent).astype(weight.dtype)

    def apply(self, x: Float[Array, "*b m"], latent: Float[Array, "..."]) -> Float[Array, "*b n"]:
        """`x @ S^T latent` for a single matrix, without forming the matrix where possible."""
        return x @ self.up(latent).astype(x.dtype)

    def apply_transposed(
        self, x: Float[Array, "*b n"], latent: Float[Array, "..."]
    ) -> Float[Array, "*b m"]:
        """`x @ (S^T latent)^T`, likewise."""
        return x @ self.up(latent).astype(x.dtype).T

    def carry(
        self, old: BoundMap, moment: Float[Array, "..."], order: Literal[1, 2]
    ) -> Float[Array, "..."]:
        """An optimiser's moment, moved from the space of the map `old` to that of this map.

        A first moment is linear in the gradient, so it rotates: `S_new S_old^T m`. A second moment
        isn't, and stays as it is.
        """
        return self.down(old.up(moment)) if order == 1 else moment

    def for_worker(self, index: Any) -> BoundMap:
        """The map that worker `index` draws; those that have no other draw are the same for all."""
        del index
        return self


@dataclasses.dataclass(frozen=True)
class LinearMap(abc.ABC):
    """A rule that makes a :class:`BoundMap` for a weight of any shape.

    Attributes:
      depends_on: What a refreshed map is computed from: ``"key"`` (random maps), ``"gradient"`` or
        ``"weight"``.
    """

    depends_on: ClassVar[Literal["key", "gradient", "weight"]] = "key"

    def init(
        self,
        key: PRNGKeyArray,
        shape: Sequence[int],
        *,
        dtype: Any = jnp.float32,
        dimension_numbers: DimensionNumbers | None = None,
    ) -> BoundMap:
        """The map for a weight of `shape`.

        Args:
          key: Where randomness comes from; data-dependent maps start as a truncated identity.
          shape: Shape of the weight, at least two axes.
          dtype: dtype of stored and generated factors.
          dimension_numbers: The axes that make the matrix; the last two by default.

        Raises:
          ValueError: When the rank exceeds the matrix, or the numbers don't fit the shape.
        """
        numbers = DimensionNumbers() if dimension_numbers is None else dimension_numbers
        shape = tuple(shape)
        count, view = matrix_view(shape, numbers)
        matrix = shape[:count] + view.matrix_shape(shape[count:])
        bound = self.init_matrix(key, matrix, dtype)
        return bound if view == MATRIX else Reshaped(bound, view)

    def refresh(
        self,
        bound: BoundMap,
        key: PRNGKeyArray,
        gradient: Float[Array, "..."] | None = None,
        weight: Float[Array, "..."] | None = None,
    ) -> BoundMap:
        """A new map of the same shapes, from a new key and the current gradient or weight.

        Raises:
          ValueError: When the map depends on a gradient or weight that is not given.
        """
        needed = {"gradient": gradient, "weight": weight}.get(self.depends_on)
        if self.depends_on != "key" and needed is None:
            raise ValueError(
                f"{self} is refreshed from the {self.depends_on}; pass {self.depends_on}="
            )
        if isinstance(bound, Reshaped):
            if needed is not None:
                needed = bound.to_matrix(needed)
            return dataclasses.replace(bound, inner=self.refresh_matrix(bound.inner, key, needed))
        return self.refresh_matrix(bound, key, needed)

    @abc.abstractmethod
    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> BoundMap:
        """:meth:`init` for a weight that already is `[*batch, m, n]`."""

    @abc.abstractmethod
    def refresh_matrix(
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> BoundMap:
        """:meth:`refresh` for `[*batch, m, n]`; `source` is what the map depends on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reshaped(BoundMap):
    """A map on the matrices of an n-dimensional weight: `S` after a transpose and a reshape.

    Attributes:
      inner: The map on `[*batch, m, n]`.
      view: How the axes that make the matrix, those after the batch axes, are `m` and `n`.
    """

    inner: BoundMap
    view: MatrixView = dataclasses.field(metadata={"static": True})

    def to_matrix(self, weight: Float[Array, "..."]) -> Float[Array, "*batch m n"]:
        """The weight as `[*batch, m, n]`."""
        return self.view.to_matrix(weight, weight.ndim - len(self.view.order))

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return self.inner.down(self.to_matrix(gradient))

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return self.view.from_matrix(self.inner.up(latent))

    def carry(  # noqa: D102
        self, old: BoundMap, moment: Float[Array, "..."], order: Literal[1, 2]
    ) -> Float[Array, "..."]:
        assert isinstance(old, Reshaped)
        return self.inner.carry(old.inner, moment, order)

    def for_worker(self, index: Any) -> Reshaped:  # noqa: D102
        return dataclasses.replace(self, inner=self.inner.for_worker(index))


@dataclasses.dataclass(frozen=True)
class Identity(LinearMap):
    """`S = I`: nothing is projected. Full-rank training in the same form as the other maps."""

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> BoundMap:  # noqa: D102
        del key, shape, dtype
        return IdentityMap()

    def refresh_matrix(  # noqa: D102
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> BoundMap:
        del key, source
        return bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdentityMap(BoundMap):
    """The map of :class:`Identity`."""

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return gradient

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return latent

    def carry(  # noqa: D102
        self, old: BoundMap, moment: Float[Array, "..."], order: Literal[1, 2]
    ) -> Float[Array, "..."]:
        del old, order
        return moment
