"""Named optimisers: :func:`lutjax.optim.project` with the maps and constants of the papers."""

from __future__ import annotations

from typing import Any

import optax
from jaxtyping import PRNGKeyArray

from lutjax.linear_maps import SVD, Gaussian, LinearMap, PrincipalWeights, RandomizedSVD
from lutjax.linear_maps.dimension_numbers import WeightDimensionNumbers
from lutjax.optim.project import OnRefresh, project


def _adam(
    learning_rate: optax.ScalarOrSchedule, b1: Any, b2: Any, eps: Any
) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.scale_by_learning_rate(learning_rate)
    )


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    exact_svd: bool = False,
    on_refresh: OnRefresh = "keep",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    key: PRNGKeyArray | int | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on the gradient's projection onto its own top singular directions.

    `R = P^T G` on the smaller side of each weight; `P` is renewed every `refresh_every` steps and
    Adam's state is kept. State of an m x n weight, m <= n: `m r + 2 n r` numbers.

    Args:
      learning_rate: Fixed, or a schedule.
      rank: `r`.
      refresh_every: Steps between new projections.
      scale: GaLore's `alpha`, on projected updates only.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      exact_svd: Whether to decompose gradients in full, as the paper does, instead of by randomised
        subspace iteration.
      on_refresh: See :func:`project`; the paper keeps the state.
      weight_dimension_numbers: Which weights are projected; see :func:`project`.
      key: Seed or key of the randomised decomposition.
      axis_name: See :func:`project`.

    Source: GaLore (arXiv 2403.03507).

    >>> import jax.numpy as jnp
    >>> galore(1e-2, rank=2).init({"w": jnp.ones((4, 8))}).maps["w"].basis.shape
    (4, 2)
    """
    map_: LinearMap = SVD(rank) if exact_svd else RandomizedSVD(rank)
    return project(
        _adam(learning_rate, b1, b2, eps),
        map_,
        refresh_every=refresh_every,
        scale=scale,
        on_refresh=on_refresh,
        weight_dimension_numbers=weight_dimension_numbers,
        key=key,
        axis_name=axis_name,
    )


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    key: PRNGKeyArray | int | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Flora: Adam on Gaussian sketches of the gradients, resampled, with the momentum transferred.

    `R = A^T G` with `A ~ N(0, 1/r)` regenerated from a key, so that only the moments are stored.

    Args:
      learning_rate: Fixed, or a schedule.
      rank: `r`.
      refresh_every: Steps between new sketches (the paper's `kappa`).
      scale: Factor on projected updates only.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_dimension_numbers: Which weights are projected; see :func:`project`.
      key: Seed or key of the sketches.
      axis_name: See :func:`project`.

    Source: Flora (arXiv 2402.03293, algorithm 2).

    >>> import jax, jax.numpy as jnp
    >>> state = flora(1e-2, rank=2).init({"w": jnp.ones((4, 8))})
    >>> sum(x.nbytes for x in jax.tree.leaves(state.maps))
    12
    """
    return project(
        _adam(learning_rate, b1, b2, eps),
        Gaussian(rank),
        refresh_every=refresh_every,
        scale=scale,
        on_refresh="rotate",
        weight_dimension_numbers=weight_dimension_numbers,
        key=key,
        axis_name=axis_name,
    )


def relora(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    refresh_every: int = 1000,
    scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    map: LinearMap | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    key: PRNGKeyArray | int | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """ReLoRA's restarts for one-sided adapters: merge, draw a new factor, reset Adam.

    The dual of training `lambda` in `W_0 + P lambda` with `P` frozen, merging it into `W_0` every
    `refresh_every` steps. (ReLoRA itself trains both factors, which no gradient transformation
    does: see :func:`lutjax.adapters.two_sided`.)

    Args:
      learning_rate: Fixed, or a schedule; a reset does not restart the schedule.
      rank: `r`.
      refresh_every: Steps between merges.
      scale: Factor on projected updates only.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      map: Another map than ``Gaussian(rank)``; `rank` is then unused.
      weight_dimension_numbers: Which weights are projected; see :func:`project`.
      key: Seed or key of the factors.
      axis_name: See :func:`project`.

    Source: ReLoRA (arXiv 2307.05695); one-sided form: Duality (arXiv 2502.13811, section 4).
    """
    return project(
        _adam(learning_rate, b1, b2, eps),
        Gaussian(rank) if map is None else map,
        refresh_every=refresh_every,
        scale=scale,
        on_refresh="reset",
        weight_dimension_numbers=weight_dimension_numbers,
        key=key,
        axis_name=axis_name,
    )


def lift(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    budget_rank: int = 128,
    refresh_every: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    key: PRNGKeyArray | int | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LIFT: Adam on the principal weights alone, the largest entries after rank reduction.

    Entries that stay selected at a refresh keep their moments; new ones start at zero.

    Args:
      learning_rate: Fixed, or a schedule.
      rank: Rank of the approximation of `W` in which entries are ranked by magnitude.
      budget_rank: `budget_rank (m + n)` entries are trained, as many as in a LoRA of this rank.
      refresh_every: Steps between selections.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_dimension_numbers: Which weights are projected; see :func:`project`.
      key: Seed or key of the randomised decomposition.
      axis_name: See :func:`project`.

    Source: LIFT (arXiv 2506.00772, algorithm 1).
    """
    return project(
        _adam(learning_rate, b1, b2, eps),
        PrincipalWeights(rank, budget_rank),
        refresh_every=refresh_every,
        on_refresh="rotate",
        weight_dimension_numbers=weight_dimension_numbers,
        key=key,
        axis_name=axis_name,
    )
