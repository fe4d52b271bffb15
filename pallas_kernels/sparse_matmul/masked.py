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
    x: jax.Array, weight: jax.Array | BlockCodes | RowCodes, thresholds: jax.Array
) -> jax.Array:
    """Like the reference, at the backend's default precision; codes stay packed."""
    if isinstance(weight, RowCodes):
        return row_matmul(reference.keep(x, thresholds), weight)
    if not isinstance(weight, BlockCodes):
        return reference.sparse_matmul(x, weight, thresholds, precision=None)
    return lut_matmul(
        reference.keep(x, thresholds),
        weight.words,
        weight.scales,
        weight.lut,
        weight.offsets,
        k=weight.k,
        group_size=weight.group_size,
    )


def row_matmul(x: jax.Array, weight: RowCodes, *, transpose: bool = False) -> jax.Array:
    """``x @ W`` or ``x @ W.T`` for codes packed along N, one tile of rows dequantised at a time.

    Args:
      x: ``[M, K]``, or ``[M, N]`` when transposed.
      weight: The codes. They are rounded to the dtype of ``x`` before the product.
      transpose: Multiplies by the transposed weight.

    Returns:
      ``[M, N]``, or ``[M, K]`` when transposed, in the dtype of ``x``; sums are taken in float32.
    """
    k, n = weight.shape
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    @jax.checkpoint  # else a derivative would keep all tiles
    def product(x: jax.Array, words: jax.Array, groups: jax.Array) -> jax.Array:
        offsets = None if weight.offsets is None else weight.offsets[groups]
        tile = RowCodes(words, weight.scales[groups], weight.lut, offsets, group_size=1)
        dense = dequantize_rows(tile, x.dtype)
        return jax.lax.dot_general(x, dense, contract, preferred_element_type=jnp.float32)

    groups = np.arange(k, dtype=np.int32) // np.int32(weight.group_size)
    axes = varying_axes(x, *jax.tree.leaves(weight))
    zeros = vary_over(jnp.zeros((x.shape[0], n), jnp.float32), axes)
    y = over_tiles(product, x, weight.words, groups, zeros, block=1, transpose=transpose)
    return y.astype(x.dtype)
