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


def column_ranges(splits: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and stop of each range of columns."""
    stops = [sum(splits[: i + 1]) for i in range(len(splits))]
    return [(stop - size, stop) for size, stop in zip(splits, stops, strict=True)]


def sparse_matmul(
    x: jax.Array,
    weight: jax.Array | BlockCodes | RowCodes,
    thresholds: jax.Array,
    *,
    splits: tuple[int, ...],
    precision: Any = jax.lax.Precision.HIGHEST,
) -> jax.Array:
    """``(x * [|x| > t_s]) @ W[:, columns of s]`` side by side for every range s of columns.

    Args:
      x: ``[M, K]``.
      weight: ``[K, N]``, ``[K, N / L, L]``, :class:`BlockCodes` or :class:`RowCodes`. A
        lookup-table weight is rounded to the dtype of ``x`` before the product.
      thresholds: ``[len(splits), 1 or K]``.
      splits: Numbers of columns, adding up to N.
      precision: Of the product.

    Returns:
      ``[M, N]`` in the dtype of ``x``; sums are taken in float32.
    """
    dense = dense_matrix(weight, x.dtype)
    parts = [
        jax.lax.dot_general(
            keep(x, t),
            dense[:, start:stop].astype(x.dtype),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        for t, (start, stop) in zip(thresholds, column_ranges(splits), strict=True)
    ]
    return jnp.concatenate(parts, axis=1).astype(x.dtype)


def supports(*_: object, **__: object) -> str | None:
    """None: the reference computes everything, and skips nothing."""
    return None
