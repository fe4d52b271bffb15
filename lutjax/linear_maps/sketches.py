"""Random one-sided maps, regenerated from a key whenever they are used: they cost no state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from lutjax.dtypes import at_least_float32
from lutjax.linear_maps.base import BoundMap, LinearMap
from lutjax.linear_maps.one_sided import OneSidedMap, Side, check_rank, projected_side

# Other generators give a batch of keys other bits than each of them, so that a slice of stacked
# weights would have another factor.
_KEYS = "threefry2x32"

Distribution = Literal["gaussian", "rademacher", "semi_orthogonal"]


def _gaussian(key: PRNGKeyArray, worker: Array, d: int, r: int, dtype: Any) -> Float[Array, "d r"]:
    key = jax.random.fold_in(key, worker)
    return jax.random.normal(key, (d, r), dtype) * jnp.asarray(1 / math.sqrt(r), dtype)


def _rademacher(
    key: PRNGKeyArray, worker: Array, d: int, r: int, dtype: Any
) -> Float[Array, "d r"]:
    key = jax.random.fold_in(key, worker)
    return jax.random.rademacher(key, (d, r), dtype) * jnp.asarray(1 / math.sqrt(r), dtype)


def _semi_orthogonal(
    key: PRNGKeyArray, worker: Array, d: int, r: int, dtype: Any
) -> Float[Array, "d r"]:
    """`r` columns of a row-sign-flipped cosine transform; workers take disjoint columns.

    Column k of the orthonormal DCT-II of length d is `sqrt(2/d) cos(pi (2i+1) k / 2d)` (and
    `1/sqrt(d)` for k = 0). The angle is reduced exactly, in integers, modulo the period 4d.
    """
    column_key, sign_key = jax.random.split(key)
    columns = jax.random.permutation(column_key, d).astype(jnp.int32)
    wanted = (worker * r + jnp.arange(r, dtype=jnp.int32)) % d
    k = columns[wanted][None, :]
    odd = 2 * jnp.arange(d, dtype=jnp.int32)[:, None] + 1
    period = 4 * d
    # k in two digits, so that the products stay below 2**31.
    phase = ((odd * (k // 256)) % period * 256 + odd * (k % 256)) % period
    wide = at_least_float32(dtype)
    angle = phase.astype(wide) * jnp.asarray(math.pi / (2 * d), wide)
    norm = jnp.where(k == 0, jnp.asarray(math.sqrt(1 / d), wide), math.sqrt(2 / d))
    signs = jax.random.rademacher(sign_key, (d, 1), wide)
    return (signs * norm * jnp.cos(angle)).astype(dtype)


_GENERATORS = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "semi_orthogonal": _semi_orthogonal,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchMap(OneSidedMap):
    """A one-sided map whose factor `P[d, r]` is a function of a key.

    Attributes:
      key_data: The bits of a Threefry key. Plain integers, which every checkpoint format can store.
      worker: Which worker's factor this is; see :meth:`for_worker`.
      d: Size of the shortened side.
      rank: `r`.
      side: Which side is shortened.
      distribution: How the factor is drawn.
      dtype: The dtype that it is drawn in (the draw depends on it).
    """

    key_data: UInt32[Array, "*batch 2"]
    worker: Int32[Array, "*batch"]
    d: int = dataclasses.field(metadata={"static": True})
    rank: int = dataclasses.field(metadata={"static": True})
    side: Side = dataclasses.field(metadata={"static": True})
    distribution: Distribution = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def basis(self) -> Float[Array, "*batch d r"]:
        """The factor `P`, generated."""

        def generate(key_data: Array, worker: Array) -> Array:
            key = jax.random.wrap_key_data(key_data, impl=_KEYS)
            draw = _GENERATORS[self.distribution]
            return draw(key, worker, self.d, self.rank, jnp.dtype(self.dtype))

        for _ in range(self.worker.ndim):
            generate = jax.vmap(generate)
        return generate(self.key_data, self.worker)

    def for_worker(self, index: Any) -> SketchMap:
        """The map of worker `index`: an independent draw, or the next semi-orthogonal columns.

        Semi-orthogonal columns of different workers are orthogonal to each other as long as
        `workers * rank <= d`, so together the workers span a larger space.
        """
        worker = jnp.broadcast_to(jnp.asarray(index, jnp.int32), self.worker.shape)
        return dataclasses.replace(self, worker=worker)


@dataclasses.dataclass(frozen=True)
class _Sketch(LinearMap):
    rank: int
    side: Side | None = None

    distribution: ClassVar[Distribution]

    def init_matrix(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> SketchMap:
        check_rank(self, self.rank, shape)
        side = projected_side(shape, self.side)
        batch = shape[:-2]
        if self.distribution == "semi_orthogonal" and max(shape[-2:]) >= 2**19:
            raise ValueError(f"a weight of shape {shape} is too large for exact angles in int32")
        return SketchMap(
            key_data=_key_data_per_matrix(key, batch),
            worker=jnp.zeros(batch, jnp.int32),
            d=shape[-2] if side == "left" else shape[-1],
            rank=self.rank,
            side=side,
            distribution=self.distribution,
            dtype=jnp.dtype(dtype).name,
        )

    def refresh_matrix(
        self, bound: BoundMap, key: PRNGKeyArray, source: Float[Array, "*batch m n"] | None
    ) -> SketchMap:
        del source
        assert isinstance(bound, SketchMap)
        return dataclasses.replace(bound, key_data=_key_data_per_matrix(key, bound.worker.shape))


def _key_data_per_matrix(key: PRNGKeyArray, batch: tuple[int, ...]) -> UInt32[Array, "*batch 2"]:
    if str(jax.random.key_impl(key)) != _KEYS:
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=_KEYS)
    return jax.random.key_data(jax.random.split(key, batch) if batch else key)


@dataclasses.dataclass(frozen=True)
class Gaussian(_Sketch):
    """`P` with independent entries `N(0, 1/r)`, so that `E[P P^T] = I`.

    Args:
      rank: `r`.
      side: ``"left"``, ``"right"`` or ``None`` for the smaller side of each weight.

    Source: Flora (arXiv 2402.03293, section 2).

    >>> bound = Gaussian(rank=2).init(jax.random.key(0), (3, 5))
    >>> bound.up(bound.down(jnp.ones((3, 5)))).shape
    (3, 5)
    """

    distribution: ClassVar[Distribution] = "gaussian"


@dataclasses.dataclass(frozen=True)
class Rademacher(_Sketch):
    """`P` with independent entries `+-1/sqrt(r)`, so that `E[P P^T] = I`.

    Args:
      rank: `r`.
      side: As for :class:`Gaussian`.

    Source: Duality (arXiv 2502.13811, section 4).
    """

    distribution: ClassVar[Distribution] = "rademacher"


@dataclasses.dataclass(frozen=True)
class SemiOrthogonal(_Sketch):
    """Random `P` with orthonormal columns, `P^T P = I` and `E[P P^T] = (r/d) I`.

    The columns are a random choice of those of a cosine transform with random row signs: closed
    form, so that regenerating them needs no decomposition.

    Args:
      rank: `r`.
      side: As for :class:`Gaussian`.

    Source: Duality (arXiv 2502.13811, section 4); subsampled randomised transforms: Tropp
    (arXiv 1011.1595).
    """

    distribution: ClassVar[Distribution] = "semi_orthogonal"
