"""Maps made of other maps: two sides at once, several sketches stacked, a Kronecker factor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lutjax.linear_maps.base import BoundMap, LinearMap


def _dependence(*maps: LinearMap) -> Any:
    needs = {m.depends_on for m in maps} - {"key"}
    if len(needs) > 1:
        raise ValueError(f"a map can depend on the gradient or on the weight, not both: {maps}")
    return needs.pop() if needs else "key"


@dataclasses.dataclass(frozen=True)
class Kronecker(LinearMap):
    """`S = R^T (x) L`: both sides are shortened, `S(G) = L G R`; adapter `W_0 + L^T Lambda R^T`.

    With the identity on one side it is the other, one-sided map (GaLore, one-sided LoRA).

    Args:
      left: Map for the rows; a map with a side must say ``side="left"``.
      right: Map for the columns; a map with a side must say ``side="right"``.

    Raises:
      ValueError: When a side is not the one it must be.

    Source: Duality (arXiv 2502.13811, section 3).

    >>> from lutjax.linear_maps import Gaussian
    >>> both = Kronecker(Gaussian(2, side="left"), Gaussian(3, side="right"))
    >>> both.init(jax.random.key(0), (8, 9)).down(jnp.ones((8, 9))).shape
    (2, 3)
    """

    left: LinearMap
    right: LinearMap

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            part = getattr(self, name)
            if getattr(part, "side", name) != name:
                raise ValueError(f"Kronecker({name}={part}) must say side={name!r}")
        _dependence(self.left, self.right)

    @property
    def depends_on(self) -> Literal["key", "gradient", "weight"]:  # type: ignore[override]
        """What either side depends on."""
        return _dependence(self.left, self.right)

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> KroneckerMap:  # noqa: D102
        left_key, right_key = jax.random.split(key)
        return KroneckerMap(
            self.left.init_matrix(left_key, shape, dtype),
            self.right.init_matrix(right_key, shape, dtype),
        )

    def refresh_matrix(  # noqa: D102
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> KroneckerMap:
        assert isinstance(bound, KroneckerMap)
        left_key, right_key = jax.random.split(key)
        return KroneckerMap(
            self.left.refresh_matrix(bound.left, left_key, source),
            self.right.refresh_matrix(bound.right, right_key, source),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerMap(BoundMap):
    """The map of :class:`Kronecker`: one after the other, as they act on different axes."""

    left: BoundMap
    right: BoundMap

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return self.right.down(self.left.down(gradient))

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return self.left.up(self.right.up(latent))

    # A left map acts on columns and a right map on rows, so they apply to batches of vectors too.

    def apply(self, x: Float[Array, "*b m"], latent: Float[Array, "..."]) -> Float[Array, "*b n"]:  # noqa: D102
        rows = x.reshape(-1, x.shape[-1])
        out = self.right.up(self.left.down(rows.T).T @ latent.astype(x.dtype))
        return out.reshape(*x.shape[:-1], -1)

    def apply_transposed(  # noqa: D102
        self, x: Float[Array, "*b n"], latent: Float[Array, "..."]
    ) -> Float[Array, "*b m"]:
        rows = x.reshape(-1, x.shape[-1])
        out = self.left.up((self.right.down(rows) @ latent.astype(x.dtype).T).T).T
        return out.reshape(*x.shape[:-1], -1)

    def for_worker(self, index: Any) -> KroneckerMap:  # noqa: D102
        return KroneckerMap(self.left.for_worker(index), self.right.for_worker(index))


@dataclasses.dataclass(frozen=True)
class Stacked(LinearMap):
    """`S = [S_1; S_2; ...]`: several one-sided maps of the same side, one below the other.

    For example, some top singular directions and some random ones. The latent is the concatenation
    along the rank.

    Args:
      *maps: One-sided maps; their ranks may differ.

    >>> from lutjax.linear_maps import SVD, SemiOrthogonal
    >>> mixed = Stacked(SVD(2), SemiOrthogonal(3))
    >>> mixed.init(jax.random.key(0), (8, 9)).down(jnp.ones((8, 9))).shape
    (5, 9)
    """

    maps: tuple[LinearMap, ...]

    def __init__(self, *maps: LinearMap) -> None:
        sides = {getattr(m, "side", "none") for m in maps}
        if len(maps) == 0 or len(sides) != 1 or "none" in sides:
            raise ValueError(f"Stacked needs one-sided maps of the same side, got {maps}")
        _dependence(*maps)
        object.__setattr__(self, "maps", tuple(maps))

    @property
    def depends_on(self) -> Literal["key", "gradient", "weight"]:  # type: ignore[override]
        """What any part depends on."""
        return _dependence(*self.maps)

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> StackedMap:  # noqa: D102
        keys = jax.random.split(key, len(self.maps))
        return StackedMap(
            tuple(m.init_matrix(k, shape, dtype) for m, k in zip(self.maps, keys, strict=True))
        )

    def refresh_matrix(  # noqa: D102
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> StackedMap:
        assert isinstance(bound, StackedMap)
        keys = jax.random.split(key, len(self.maps))
        return StackedMap(
            tuple(
                m.refresh_matrix(b, k, source)
                for m, b, k in zip(self.maps, bound.parts, keys, strict=True)
            )
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedMap(BoundMap):
    """The map of :class:`Stacked`."""

    parts: tuple[Any, ...]

    def _axis(self) -> int:
        return -2 if self.parts[0].side == "left" else -1

    def _split(self, latent: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        ranks = [part.basis.shape[-1] for part in self.parts]
        ends = [sum(ranks[: i + 1]) for i in range(len(ranks) - 1)]
        return jnp.split(latent, ends, axis=self._axis())

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        return jnp.concatenate([part.down(gradient) for part in self.parts], axis=self._axis())

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        pieces = self._split(latent)
        return sum(part.up(x) for part, x in zip(self.parts, pieces, strict=True))

    def apply(self, x: Float[Array, "*b m"], latent: Float[Array, "..."]) -> Float[Array, "*b n"]:  # noqa: D102
        pieces = self._split(latent)
        return sum(part.apply(x, y) for part, y in zip(self.parts, pieces, strict=True))

    def apply_transposed(  # noqa: D102
        self, x: Float[Array, "*b n"], latent: Float[Array, "..."]
    ) -> Float[Array, "*b m"]:
        pieces = self._split(latent)
        return sum(part.apply_transposed(x, y) for part, y in zip(self.parts, pieces, strict=True))

    def for_worker(self, index: Any) -> StackedMap:  # noqa: D102
        return StackedMap(tuple(part.for_worker(index) for part in self.parts))


@dataclasses.dataclass(frozen=True)
class KronA(LinearMap):
    """`S^T(B) = A (x) B` for a random factor `A`: the update is a Kronecker product with `A`.

    `W[p b_m + i, q b_n + j] = A[p, q] B[i, j]`, `A` has shape `factor` and entries
    `N(0, 1/(a_m a_n))`. The latent `B` has shape `[m / a_m, n / a_n]`.

    Args:
      factor: `(a_m, a_n)`, which must divide `(m, n)`.

    Source: KronA (arXiv 2212.10650, section 3).

    >>> KronA((4, 2)).init(jax.random.key(0), (8, 6)).down(jnp.ones((8, 6))).shape
    (2, 3)
    """

    factor: tuple[int, int]

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> KronAMap:  # noqa: D102
        a_m, a_n = self.factor
        if a_m < 1 or a_n < 1 or shape[-2] % a_m or shape[-1] % a_n:
            raise ValueError(
                f"factor={self.factor} of KronA must divide the matrix axes of shape {shape}"
            )
        return KronAMap(self._draw(key, shape[:-2], dtype))

    def refresh_matrix(  # noqa: D102
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> KronAMap:
        del source
        assert isinstance(bound, KronAMap)
        return KronAMap(self._draw(key, bound.factor.shape[:-2], bound.factor.dtype))

    def _draw(self, key: PRNGKeyArray, batch: tuple[int, ...], dtype: Any) -> Array:
        scale = jnp.asarray(1 / math.sqrt(self.factor[0] * self.factor[1]), dtype)
        return jax.random.normal(key, (*batch, *self.factor), dtype) * scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KronAMap(BoundMap):
    """The map of :class:`KronA`. The factor is small, and stored so that it can be trained too."""

    factor: Float[Array, "*batch p q"]

    def down(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        p, q = self.factor.shape[-2:]
        *batch, m, n = gradient.shape
        blocks = gradient.reshape(*batch, p, m // p, q, n // q)
        return jnp.einsum("...pq,...piqj->...ij", self.factor.astype(gradient.dtype), blocks)

    def up(self, latent: Float[Array, "..."]) -> Float[Array, "..."]:  # noqa: D102
        p, q = self.factor.shape[-2:]
        *batch, i, j = latent.shape
        product = jnp.einsum("...pq,...ij->...piqj", self.factor.astype(latent.dtype), latent)
        return product.reshape(*batch, p * i, q * j)

    def apply(self, x: Float[Array, "*b m"], latent: Float[Array, "..."]) -> Float[Array, "*b n"]:  # noqa: D102
        p, q = self.factor.shape
        i, j = latent.shape
        blocks = x.reshape(*x.shape[:-1], p, i) @ latent.astype(x.dtype)
        out = jnp.einsum("...pj,pq->...qj", blocks, self.factor.astype(x.dtype))
        return out.reshape(*x.shape[:-1], q * j)

    def apply_transposed(  # noqa: D102
        self, x: Float[Array, "*b n"], latent: Float[Array, "..."]
    ) -> Float[Array, "*b m"]:
        return KronAMap(self.factor.T).apply(x, latent.T)
