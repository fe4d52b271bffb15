"""The sparse product as a dense one of masked activations: right for many rows, saves nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.sparse_matmul import reference
from pallas_kernels.sparse_matmul.blocks import BlockCodes
from pallas_kernels.sparse_matmul.rows import RowCodes

supports = reference.supports


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | BlockCodes | RowCodes,
    thresholds: jax.Array,
    *,
    splits: tuple[int, ...],
) -> jax.Array:
    """Like the reference, at the backend's default precision; canonical words stay packed."""
    if not isinstance(weight, BlockCodes):
        return reference.sparse_matmul(x, weight, thresholds, splits=splits, precision=None)
    parts = []
    for t, (start, stop) in zip(thresholds, reference.column_ranges(splits), strict=True):
        part = weight if len(splits) == 1 else weight.columns(start, stop)
        parts.append(
            lut_matmul(
                reference.keep(x, t),
                part.words,
                part.scales,
                part.lut,
                part.offsets,
                k=part.k,
                group_size=part.group_size,
            )
        )
    return jnp.concatenate(parts, axis=1)
