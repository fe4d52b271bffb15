"""The sparse product as a dense one of masked activations: right for many rows, saves nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.lut_matmul.xla import over_tiles
from pallas_kernels.manual_axes import vary_over, varying_axes
from pallas_kernels.sparse_matmul import reference
from pallas_kernels.sparse_matmul.blocks import BlockCodes
from pallas_kernels.sparse_matmul.rows import RowCodes, dequantize_rows

supports = reference.supports


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | BlockCodes | RowCodes,
    thresholds: jax.Array,
    *,
    splits: tuple[int, ...],
) -> jax.Array:
    """Like the reference, at the backend's default precision; codes stay packed."""
    if isinstance(weight, RowCodes):
        kept = jnp.concatenate([reference.keep(x, t) for t in thresholds])
        return row_matmul(kept, weight, splits=splits)
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


def row_matmul(
    x: jax.Array,
    weight: RowCodes,
    *,
    splits: tuple[int, ...] | None = None,
    transpose: bool = False,
) -> jax.Array:
    """``x @ W`` or ``x @ W.T`` for codes packed along N, one tile of rows dequantised at a time.

    Args:
      x: ``[M, K]``, or ``[M, N]`` when transposed. With S ranges of columns, ``[S M, K]``: M rows
        for each.
      weight: The codes. They are rounded to the dtype of ``x`` before the product.
      splits: Numbers of columns of the ranges.
      transpose: Multiplies by the transposed weight.

    Returns:
      ``[M, N]``, or ``[M, K]`` when transposed, in the dtype of ``x``; sums are taken in float32.
    """
    k, n = weight.shape
    ranges = reference.column_ranges(splits or (n,))
    m = x.shape[0] // len(ranges)
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    @jax.checkpoint  # else a derivative would keep all tiles
    def product(x: jax.Array, words: jax.Array, groups: jax.Array) -> jax.Array:
        offsets = None if weight.offsets is None else weight.offsets[groups]
        tile = RowCodes(words, weight.scales[groups], weight.lut, offsets, group_size=1)
        dense = dequantize_rows(tile, x.dtype)
        parts = [
            jax.lax.dot_general(
                x[i * m : (i + 1) * m],
                dense if len(ranges) == 1 else dense[:, start:stop],
                contract,
                preferred_element_type=jnp.float32,
            )
            for i, (start, stop) in enumerate(ranges)
        ]
        return jnp.concatenate(parts, axis=1)

    groups = np.arange(k, dtype=np.int32) // np.int32(weight.group_size)
    axes = varying_axes(x, *jax.tree.leaves(weight))
    zeros = vary_over(jnp.zeros((m, n), jnp.float32), axes)
    y = over_tiles(product, x, weight.words, groups, zeros, block=1, transpose=transpose)
    return y.astype(x.dtype)
