"""``ragged_dot_general``: rows that each meet one entry of a stack of weights, such as experts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lutjax.arrays import CompressedArray, is_compressed
from lutjax.arrays.base import entry, map_tiles
from lutjax.lift.products import fits_kernel, is_packed, plan_product, transposed
from lutjax.lift.registry import NEEDS_DENSE, rule

MAX_TILE = 512
"""Rows that are multiplied together, at most; only tiles are ever padded."""


@rule("ragged_dot_general")
def _ragged_dot_general(params: dict, x: Any, weight: Any, sizes: Any, *offset: Any) -> Any:
    numbers = params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    x_contract, w_contract = (tuple(axes) for axes in contract)
    rows = tuple(numbers.lhs_ragged_dimensions)
    grouped = tuple(numbers.rhs_group_dimensions) == (0,) and not any(batch)
    if is_compressed(x) or not is_compressed(weight) or offset or not grouped:
        return NEEDS_DENSE
    out_dtype = params["preferred_element_type"] or jnp.result_type(x.dtype, weight.dtype)
    plan = plan_product(weight, w_contract, ()) if len(weight.batch_shape) == 1 else None
    unfit = plan is None or plan.summed or len(plan.contracted) != len(x_contract)
    if unfit or x.ndim != 1 + len(x_contract) or rows[0] in x_contract:
        return NEEDS_DENSE
    if not (fits_kernel(x.dtype) and fits_kernel(out_dtype)):
        return NEEDS_DENSE
    assert plan is not None
    partner = dict(zip(w_contract, x_contract, strict=True))
    x = transposed(x, (*rows, *(partner[axis] for axis in plan.contracted)))
    x = x.reshape(x.shape[0], int(np.prod(x.shape[1:])))
    if jnp.finfo(out_dtype).bits > jnp.finfo(x.dtype).bits and not is_packed(weight):
        x = x.astype(out_dtype)
    y = _grouped_product(weight, x, sizes, transpose=plan.transposed).astype(out_dtype)
    # The axes of the weight that are left follow the rows, in its order.
    y = y.reshape(x.shape[0], *(weight.shape[axis] for axis in plan.kept))
    ascending = sorted(range(len(plan.kept)), key=lambda i: plan.kept[i])
    return transposed(y, (0, *(1 + i for i in ascending)))


def _grouped_product(
    weight: CompressedArray, x: Float[Array, "m k"], sizes: Int[Array, " e"], *, transpose: bool
) -> Float[Array, "m n"]:
    """Rows of ``x``, sorted by group, times the entries of their groups; zero after the last group.

    Rows are put into tiles of one group each, so that whatever the sizes of the groups, shapes are
    known, an entry that no row meets is not read, and one that many meet is read once a tile.
    """
    m, count = x.shape[0], weight.batch_shape[0]
    if not m:
        return jnp.zeros((0, weight.matrix_shape[0 if transpose else 1]), x.dtype)
    rows = _tile_rows(m, count)
    # No more tiles, if as many groups as possible end with a row of their own.
    tiles = (m + min(m, count) * (rows - 1)) // rows
    sizes = sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    used = -(-sizes // rows)
    last_tiles = jnp.cumsum(used)
    first_tiles = last_tiles - used

    tile = jnp.arange(tiles, dtype=jnp.int32)
    groups = _group_of(tile, last_tiles)
    first = starts[groups] + (tile - first_tiles[groups]) * rows
    filled = jnp.clip(ends[groups] - first, 0, rows)
    row = jnp.arange(rows, dtype=jnp.int32)[None]
    gathered = jnp.take(x, first[:, None] + row, axis=0, mode="clip")
    gathered = jnp.where((row < filled[:, None])[..., None], gathered, jnp.zeros((), x.dtype))
    if transpose:
        y = map_tiles(lambda g, x: entry(weight, g).matmul_transposed(x), groups, gathered, count)
    else:
        y = weight.matmul_grouped(gathered, groups, filled)

    place = jnp.arange(m, dtype=jnp.int32)
    groups = _group_of(place, ends)
    within = place - starts[groups]
    found = jnp.take(
        y.reshape(-1, y.shape[-1]),
        (first_tiles[groups] + within // rows) * rows + within % rows,
        axis=0,
        mode="clip",
    )
    return jnp.where((place < ends[-1])[:, None], found, jnp.zeros((), y.dtype))


def _group_of(place: Int[Array, " m"], ends: Int[Array, " e"]) -> Int[Array, " m"]:
    """The group that each place lies in, the last one for places after all groups."""
    found = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1)


def _tile_rows(m: int, count: int) -> int:
    """Rows of a tile: about as many as a group has, more where few rows cost no more than one."""
    if m <= count:
        return 1
    mean = m / count
    return min(MAX_TILE, 1 << int(np.ceil(np.log2(max(mean, min(2 * mean, 16))))))
