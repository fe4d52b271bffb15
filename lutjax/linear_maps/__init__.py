"""Linear maps `S` on gradients, each the transpose of an adapter.

A :class:`LinearMap` is a rule such as ``SVD(rank=128)``. ``rule.init(key, shape)`` makes the
:class:`BoundMap` for one weight, with ``down(G) = S G``, ``up(R) = S^T R`` and
``adapter(W, R) = W + S^T R``. Training `R` in the adapter with any optimiser, or giving the same
optimiser the gradients `S G` and applying `S^T` to its updates, is the same computation
(arXiv 2502.13811, section 3).
"""

from lutjax.linear_maps.base import BoundMap, Identity, LinearMap, Reshaped
from lutjax.linear_maps.composed import KronA, Kronecker, Stacked
from lutjax.linear_maps.dimension_numbers import (
    DimensionNumbers,
    matching,
    resolve_dimension_numbers,
)
from lutjax.linear_maps.one_sided import SVD, Projection, RandomizedSVD
from lutjax.linear_maps.selection import PrincipalWeights
from lutjax.linear_maps.sketches import Gaussian, Rademacher, SemiOrthogonal

__all__ = [
    "SVD",
    "BoundMap",
    "DimensionNumbers",
    "Gaussian",
    "Identity",
    "KronA",
    "Kronecker",
    "LinearMap",
    "PrincipalWeights",
    "Projection",
    "Rademacher",
    "RandomizedSVD",
    "Reshaped",
    "SemiOrthogonal",
    "Stacked",
    "matching",
    "resolve_dimension_numbers",
]
