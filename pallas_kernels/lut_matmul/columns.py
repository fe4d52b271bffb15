"""Single columns of an array, of which nothing else is moved."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lut_matmul import dispatch


def take_columns(array: jax.Array, columns: jax.Array) -> jax.Array:
    """``array[..., columns]``, for columns in range, which moves nothing else on a TPU either."""
    if dispatch.compiling_for("tpu"):
        return columns_by_tiles(array, columns)
    return jnp.take(array, columns, axis=-1, mode="clip")


def columns_by_tiles(array: jax.Array, columns: jax.Array) -> jax.Array:
    """One lane of one tile after the other: for a gather, XLA would transpose all of the array."""
    n = array.shape[-1]
    width = min(128, n)

    def one(column: jax.Array) -> jax.Array:
        start = jnp.minimum(column // width * width, n - width)
        tile = jax.lax.dynamic_slice_in_dim(array, start, width, axis=-1)
        lane = jax.lax.broadcasted_iota(columns.dtype, tile.shape, tile.ndim - 1)
        return jnp.sum(jnp.where(lane == column - start, tile, 0), axis=-1, dtype=tile.dtype)

    return jnp.moveaxis(jax.lax.map(one, columns), 0, -1)
