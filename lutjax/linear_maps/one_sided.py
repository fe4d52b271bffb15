"""Maps with a stored factor `P`: the top singular vectors of the gradient (GaLore)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lutjax.dtypes import at_least_float32
from lutjax.linear_maps.base import BoundMap, LinearMap
from lutjax.transforms.svd import range_basis

Side = Literal["left", "right"]


def projected_side(shape: tuple[int, ...], side: Side | None) -> Side:
    """The side of `[..., m, n]` that a one-sided map shortens: the smaller one unless named."""
    if side not in (None, "left", "right"):
        raise ValueError(f"side={side!r} must be 'left', 'right' or None (the smaller side)")
    if side is not None:
        return side
    return "left" if shape[-2] <= shape[-1] else "right"


def check_rank(map_: LinearMap, rank: int, shape: tuple[int, ...]) -> None:
    """Raises when `rank` can't be the rank of an `m x n` matrix."""
    if not isinstance(rank, (int, np.integer)) or isinstance(rank, bool):
        raise TypeError(f"rank={rank!r} of {type(map_).__name__} must be an int")
    smallest = min(shape[-2:])
    if not 1 <= rank <= smallest:
        raise ValueError(
            f"rank={rank} of {type(map_).__name__} must be between 1 and min(m, n)={smallest} "
            f"for a weight of shape {shape}"
        )


class OneSidedMap(BoundMap):
    """A map that multiplies one side of the matrix: `P^T G` for the left side, `G P` for the right.

    Subclasses have a factor ``basis``, `P` of `[*batch, d, r]` where `d` is the size of the
    shortened side, and say which ``side`` that is.
    """

    basis: Any  # a field or a property
    side: Side

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        basis = self.basis.astype(gradient.dtype)
        if self.side == "left":
            return jnp.matrix_transpose(basis) @ gradient
        return gradient @ basis

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        basis = self.basis.astype(latent.dtype)
        return basis @ latent if self.side == "left" else latent @ jnp.matrix_transpose(basis)

    def apply(self, x: Float[Array, "*b m"], latent: Float[Array, "..."]) -> Float[Array, "*b n"]:  # noqa: D102
        # Two thin products, so that no m x n matrix is formed either way.
        basis, latent = self.basis.astype(x.dtype), latent.astype(x.dtype)
        return (x @ basis) @ latent if self.side == "left" else (x @ latent) @ basis.T

    def apply_transposed(  # noqa: D102
        self, x: Float[Array, "*b n"], latent: Float[Array, "..."]
    ) -> Float[Array, "*b m"]:
        basis, latent = self.basis.astype(x.dtype), latent.astype(x.dtype)
        return (x @ latent.T) @ basis.T if self.side == "left" else (x @ basis) @ latent.T

    def carry(  # noqa: D102
        self, old: BoundMap, moment: Float[Array, "..."], order: Literal[1, 2]
    ) -> Float[Array, "..."]:
        if order == 2:
            return moment
        assert isinstance(old, OneSidedMap)
        # P_new^T P_old is r x r: cheaper than going through the weight's shape.
        rotation = jnp.matrix_transpose(self.basis) @ old.basis
        rotation = rotation.astype(moment.dtype)
        if self.side == "left":
            return rotation @ moment
        return moment @ jnp.matrix_transpose(rotation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection(OneSidedMap):
    """A one-sided map with a stored factor.

    Attributes:
      basis: `P`, `[*batch, d, r]` where `d` is the size of the shortened side.
      side: Which side is shortened.
    """

    basis: Float[Array, "*batch d r"]
    side: Side = dataclasses.field(metadata={"static": True})


def _canonical_signs(basis: Float[Array, "*batch d r"]) -> Float[Array, "*batch d r"]:
    """Singular vectors, unique only up to sign, with their entry of largest magnitude positive."""
    largest = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
    sign = jnp.sign(jnp.take_along_axis(basis, largest, axis=-2))
    return basis * jnp.where(sign == 0, jnp.ones_like(sign), sign)


@dataclasses.dataclass(frozen=True)
class SVD(LinearMap):
    """The top singular vectors of the current gradient, from a full decomposition.

    `G = U s V^T`; the left side is shortened by `P = U[:, :r]`, the right side by `P = V[:, :r]`.

    Args:
      rank: `r`.
      side: ``"left"``, ``"right"`` or ``None`` for the smaller side of each weight.

    Source: GaLore (arXiv 2403.03507, section 3).

    >>> bound = SVD(rank=2).init(jax.random.key(0), (3, 5))
    >>> bound.down(jnp.ones((3, 5))).shape
    (2, 5)
    """

    rank: int
    side: Side | None = None
    depends_on: ClassVar[Literal["key", "gradient", "weight"]] = "gradient"

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Projection:  # noqa: D102
        del key
        check_rank(self, self.rank, shape)
        side = projected_side(shape, self.side)
        d = shape[-2] if side == "left" else shape[-1]
        basis = jnp.broadcast_to(jnp.eye(d, self.rank, dtype=dtype), (*shape[:-2], d, self.rank))
        return Projection(basis, side)

    def refresh_matrix(  # noqa: D102
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> Projection:
        assert isinstance(bound, Projection) and source is not None
        dtype = bound.basis.dtype
        wide = at_least_float32(dtype)
        # As d x k, the shortened side first, with k >= d for the default side.
        matrix = source if bound.side == "left" else jnp.matrix_transpose(source)
        basis = self.top_vectors(key, matrix.astype(wide))
        return Projection(_canonical_signs(basis).astype(dtype), bound.side)

    def top_vectors(
        self, key: PRNGKeyArray, matrix: Float[Array, "*batch d k"]
    ) -> Float[Array, "*batch d r"]:
        """The top `rank` left singular vectors."""
        del key
        u, _, _ = jnp.linalg.svd(matrix, full_matrices=False)
        return u[..., : self.rank]


@dataclasses.dataclass(frozen=True)
class RandomizedSVD(SVD):
    """:class:`SVD` by subspace iteration from a random start instead of a decomposition.

    `Y = (G G^T)^q G Omega` with `Omega` Gaussian of `r + oversample` columns, `Q = qr(Y)`, and the
    singular vectors of `Q^T G` (small) rotated back.

    Args:
      rank: `r`.
      side: As for :class:`SVD`.
      oversample: Extra columns.
      power_iterations: `q`; each multiplies the decay of the spectrum.

    Source: Halko, Martinsson, Tropp (arXiv 0909.4061, algorithms 4.4 and 5.1).
    """

    oversample: int = 8
    power_iterations: int = 1

    def top_vectors(  # noqa: D102
        self, key: PRNGKeyArray, matrix: Float[Array, "*batch d k"]
    ) -> Float[Array, "*batch d r"]:
        columns = min(self.rank + self.oversample, *matrix.shape[-2:])
        q = range_basis(key, matrix, columns, self.power_iterations)
        small = jnp.matrix_transpose(q) @ matrix
        # Left singular vectors of the small matrix as eigenvectors of its Gram matrix: the loss of
        # accuracy in the small singular values does not matter for the top ones.
        _, vectors = jnp.linalg.eigh(small @ jnp.matrix_transpose(small))
        return q @ vectors[..., ::-1][..., : self.rank]
