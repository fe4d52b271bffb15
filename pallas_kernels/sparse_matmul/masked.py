"""The sparse product as a dense one of masked activations: right for many rows, saves nothing."""

from __future__ import annotations

import jax

from pallas_kernels.sparse_matmul import reference
from pallas_kernels.sparse_matmul.rows import RowCodes

supports = reference.supports


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | RowCodes,
    thresholds: jax.Array,
    *,
    splits: tuple[int, ...],
) -> jax.Array:
    """Like the reference, at the backend's default precision."""
    return reference.sparse_matmul(x, weight, thresholds, splits=splits, precision=None)
