"""The meaning of the sparse product, in plain ``jax.numpy``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_matmul.blocks import BlockCodes, dequantize_blocks
from pallas_kernels.sparse_matmul.checks import matrix_shape
from pallas_kernels.sparse_matmul.rows import RowCodes, dequantize_rows


def keep(x: jax.Array, thresholds: jax.Array) -> jax.Array:
    """``x`` with zeros where ``|x| <= t``; NaN is kept.

    Args:
      x: ``[M, K]``.
      thresholds: ``float32[1]`` or ``float32[K]``.
    """
    small = jnp.abs(x).astype(jnp.float32) <= thresholds[None, :].astype(jnp.float32)
    return jnp.where(small, jnp.zeros((), x.dtype), x)


def dense_matrix(weight: jax.Array | BlockCodes | RowCodes, dtype: Any) -> jax.Array:
    """The weight as ``[K, N]``: a lookup-table one is made dense in ``dtype``."""
    if isinstance(weight, RowCodes):
        return dequantize_rows(weight, dtype)
    if isinstance(weight, BlockCodes):
        return dequantize_blocks(weight, dtype)
    return weight.reshape(matrix_shape(weight))


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | BlockCodes | RowCodes,
    thresholds: jax.Array,
    *,
    precision: Any = jax.lax.Precision.HIGHEST,
) -> jax.Array:
    """``(x * [|x| > t]) @ W``.

    Args:
      x: ``[M, K]``.
      weight: ``[K, N]``, ``[K, N / L, L]``, :class:`BlockCodes` or :class:`RowCodes`. A
        lookup-table weight is rounded to the dtype of ``x`` before the product.
      thresholds: ``[1]`` or ``[K]``.
      precision: Of the product.

    Returns:
      ``[M, N]`` in the dtype of ``x``; sums are taken in float32.
    """
    y = jax.lax.dot_general(
        keep(x, thresholds),
        dense_matrix(weight, x.dtype).astype(x.dtype),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def supports(*_: object, **__: object) -> str | None:
    """None: the reference computes everything, and skips nothing."""
    return None
