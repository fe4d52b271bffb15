"""A map that keeps some entries of the weight: its principal entries after rank reduction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from lutjax.dtypes import at_least_float32
from lutjax.linear_maps.base import BoundMap, LinearMap
from lutjax.linear_maps.one_sided import SVD, RandomizedSVD, check_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionMap(BoundMap):
    """`S` picks the entries `indices` of the flattened matrix; `S^T` scatters them into zeros.

    Attributes:
      indices: `[*batch, k]`, distinct and ascending, into the row-major matrix.
      shape: `(m, n)`.
    """

    indices: Int32[Array, "*batch k"]
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        flat = gradient.reshape(*gradient.shape[:-2], -1)
        return jnp.take_along_axis(flat, self.indices, axis=-1)

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        batch = latent.shape[:-1]
        size = math.prod(self.shape)
        flat = jnp.zeros((*batch, size), latent.dtype)
        flat = jnp.put_along_axis(flat, self.indices, latent, axis=-1, inplace=False)
        return flat.reshape(*batch, *self.shape)

    def carry(  # noqa: D102
        self, old: BoundMap, moment: Float[Array, "..."], order: Literal[1, 2]
    ) -> Float[Array, "..."]:
        # Entries that stay selected keep their moments, of either order; new ones start at zero.
        del order
        return self.down(old.up(moment))


@dataclasses.dataclass(frozen=True)
class PrincipalWeights(LinearMap):
    """The `k = budget_rank (m + n)` largest entries of the rank-`rank` part of the weight.

    Args:
      rank: Rank of the approximation of `W` in which magnitudes are compared.
      budget_rank: As many entries as a LoRA of this rank has parameters.

    Source: LIFT (arXiv 2506.00772, section 3).

    >>> PrincipalWeights(rank=2, budget_rank=1).init(jax.random.key(0), (4, 6)).indices.shape
    (10,)
    """

    rank: int
    budget_rank: int
    depends_on: ClassVar[Literal["key", "gradient", "weight"]] = "weight"

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> SelectionMap:  # noqa: D102
        del key, dtype
        check_rank(self, self.rank, shape)
        check_rank(self, self.budget_rank, shape)
        m, n = shape[-2:]
        if m * n >= 2**31:
            raise ValueError(f"a weight of shape {shape} has too many entries for int32 indices")
        k = min(self.budget_rank * (m + n), m * n)
        indices = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (*shape[:-2], k))
        return SelectionMap(indices, (m, n))

    def refresh_matrix(  # noqa: D102
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> SelectionMap:
        assert isinstance(bound, SelectionMap) and source is not None
        weight = source.astype(at_least_float32(source.dtype))
        # For small matrices the sketch would be as large as the matrix: decompose it.
        exact = 2 * (self.rank + 8) >= min(weight.shape[-2:])
        svd = SVD(self.rank) if exact else RandomizedSVD(self.rank, power_iterations=2)
        u = svd.top_vectors(key, weight)
        reduced = u @ (jnp.matrix_transpose(u) @ weight)
        flat = jnp.abs(reduced).reshape(*reduced.shape[:-2], -1)
        _, indices = jax.lax.top_k(flat, bound.indices.shape[-1])
        return SelectionMap(jnp.sort(indices, axis=-1).astype(jnp.int32), bound.shape)
