"""Single columns of an array, of which nothing else is moved."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.manual_axes import is_partitioned_automatically

_LANES = 128  # of a tile of a TPU


def take_columns(array: jax.Array, columns: jax.Array) -> jax.Array:
    """``array[..., columns]``, with indices clipped to the columns that there are.

    On a TPU, a few columns of an array that lies on one device are read tile by tile: for a gather
    along lanes XLA transposes all of the array. From where their tiles are more than that on, and
    for arrays that the compiler splits over devices and a slice would bring together, it is a
    gather all the same.
    """
    columns = columns.astype(jnp.int32)  # the number of columns may not fit a narrower dtype
    few = columns.size * _LANES <= array.shape[-1]
    if few and platforms.compiling_for("tpu") and not is_partitioned_automatically(array):
        return columns_by_tiles(array, columns)
    return jnp.take(array, columns, axis=-1, mode="clip")


def columns_by_tiles(array: jax.Array, columns: jax.Array) -> jax.Array:
    """One lane of one tile after the other."""
    n = array.shape[-1]
    width = min(_LANES, n)

    def one(column: jax.Array) -> jax.Array:
        start = jnp.minimum(column // width * width, n - width)
        tile = jax.lax.dynamic_slice_in_dim(array, start, width, axis=-1)
        lane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, tile.ndim - 1)
        return jnp.sum(jnp.where(lane == column - start, tile, 0), axis=-1, dtype=tile.dtype)

    columns = jnp.clip(columns, 0, n - 1)
    return jnp.moveaxis(jax.lax.map(one, columns), 0, -1)
