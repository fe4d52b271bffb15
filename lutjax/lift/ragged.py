"""``ragged_dot_general``: rows that each meet one entry of a stack of weights, such as experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lutjax.arrays import CompressedArray, DenseArray, is_compressed
from lutjax.arrays.grouped import entry, map_tiles
from lutjax.lift.products import fits_kernel, plan_product, transposed
from lutjax.lift.registry import NEEDS_DENSE, rule
from pallas_kernels.manual_axes import is_partitioned_automatically
from pallas_kernels.platforms import compiling_for

MAX_TILE = 512
"""Rows that are multiplied together, at most; only tiles are ever padded."""


@rule("ragged_dot_general")
def _ragged_dot_general(params: dict, x: Any, weight: Any, sizes: Any, *offset: Any) -> Any:
    if is_compressed(x) or offset:
        return NEEDS_DENSE
    product = _planned(params, x, weight)
    return NEEDS_DENSE if product is None else product(x, weight, sizes)


def dense_ragged_dot(params: dict, x: Any, weight: Any, sizes: Any, *offset: Any) -> Any:
    """The same with dense weights, where that is better than what XLA does: not on TPUs.

    Elsewhere XLA multiplies all rows with all entries. That, though, it can split over devices.
    """
    if weight.ndim != 3 or offset or compiling_for("tpu") or is_partitioned_automatically(weight):
        return NEEDS_DENSE
    tiled = _planned(params, x, DenseArray.of(weight, 1))
    if tiled is None:
        return NEEDS_DENSE

    @jax.custom_vjp
    def product(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
        return tiled(x, DenseArray.of(weight, 1), sizes)

    def forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return product(*operands), operands

    def backward(operands: tuple[jax.Array, ...], dy: jax.Array) -> tuple[Any, ...]:
        x, weight, sizes = operands
        numbers, dtype = params["ragged_dot_dimension_numbers"], params["preferred_element_type"]
        dx = jax.vjp(lambda x: tiled(x, DenseArray.of(weight, 1), sizes), x)[1](dy)[0]

        def own(weight: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot_general(
                x, weight, sizes, numbers, preferred_element_type=dtype
            )

        # XLA's own, as a tile's gradient of the weight would be as large as all of it.
        return dx, jax.vjp(own, weight)[1](dy)[0], None

    product.defvjp(forward, backward)
    return product(x, weight, sizes)


def _planned(
    params: dict, x: Any, weight: CompressedArray
) -> Callable[[jax.Array, CompressedArray, jax.Array], jax.Array] | None:
    """The product as a function of rows, weight and sizes; None if the stored form cannot."""
    numbers = params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    x_contract, w_contract = (tuple(axes) for axes in contract)
    rows = tuple(numbers.lhs_ragged_dimensions)
    one_stack = tuple(numbers.rhs_group_dimensions) == (0,) and not any(batch)
    only_rows = x.ndim == 1 + len(x_contract) and rows[0] not in x_contract
    if not (one_stack and only_rows and len(weight.batch_shape) == 1):
        return None
    plan = plan_product(weight, w_contract, ())
    if plan is None or plan.summed or len(plan.contracted) != len(x_contract):
        return None
    out_dtype = params["preferred_element_type"]
    if not (fits_kernel(x.dtype) and fits_kernel(out_dtype)):
        return None
    partner = dict(zip(w_contract, x_contract, strict=True))
    order = (*rows, *(partner[axis] for axis in plan.contracted))
    kept = tuple(weight.shape[axis] for axis in plan.kept)
    # The axes of the weight that are left follow the rows, in its order.
    ascending = (0, *(1 + i for i in sorted(range(len(kept)), key=lambda i: plan.kept[i])))

    def product(x: jax.Array, weight: CompressedArray, sizes: jax.Array) -> jax.Array:
        x = transposed(x, order)
        x = x.reshape(x.shape[0], int(np.prod(x.shape[1:])))
        y = _grouped_product(weight, x, sizes, out_dtype, transpose=plan.transposed)
        return transposed(y.reshape(x.shape[0], *kept), ascending)

    return product


def _grouped_product(
    weight: CompressedArray,
    x: Float[Array, "m k"],
    sizes: Int[Array, " e"],
    out_dtype: Any,
    *,
    transpose: bool,
) -> Float[Array, "m n"]:
    """Rows of ``x``, sorted by group, times the entries of their groups; zero after the last group.

    Rows are put into tiles of one group each, so that shapes are known whatever the sizes of the
    groups are, and an entry is read once a tile that meets it.
    """
    m, count = x.shape[0], weight.batch_shape[0]
    if not m:
        return jnp.zeros((0, weight.matrix_shape[0 if transpose else 1]), out_dtype)
    rows = _tile_rows(m, count)
    # There are most tiles where as many groups as possible end with a tile of one row.
    tiles = (m + min(m, count) * (rows - 1)) // rows
    sizes = sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    used = -(-sizes // rows)
    tile_ends = jnp.cumsum(used)
    tile_starts = tile_ends - used

    tile = jnp.arange(tiles, dtype=jnp.int32)
    tile_groups = _group_of(tile, tile_ends)
    first = starts[tile_groups] + (tile - tile_starts[tile_groups]) * rows
    filled = jnp.clip(ends[tile_groups] - first, 0, rows)
    row = jnp.arange(rows, dtype=jnp.int32)[None]
    x_tiles = jnp.take(x, first[:, None] + row, axis=0, mode="clip")
    x_tiles = jnp.where((row < filled[:, None])[..., None], x_tiles, jnp.zeros((), x.dtype))
    if transpose:
        y = map_tiles(
            lambda group, rows: entry(weight, group).matmul_transposed(rows, out_dtype=out_dtype),
            weight,
            x_tiles,
            tile_groups,
            filled,
        )
    else:
        y = weight.matmul_grouped(x_tiles, tile_groups, filled, out_dtype=out_dtype)

    place = jnp.arange(m, dtype=jnp.int32)
    groups = _group_of(place, ends)
    within = place - starts[groups]
    found = jnp.take(
        y.reshape(-1, y.shape[-1]),
        (tile_starts[groups] + within // rows) * rows + within % rows,
        axis=0,
        mode="clip",
    )
    return jnp.where((place < ends[-1])[:, None], found, jnp.zeros((), y.dtype))


def _group_of(place: Int[Array, " m"], ends: Int[Array, " e"]) -> Int[Array, " m"]:
    """The group that each place lies in, the last one for places after all groups."""
    # Comparing all is no loop, which accelerators would have to be told to go on with.
    found = jnp.searchsorted(ends, place, side="right", method="compare_all").astype(jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1)


def _tile_rows(m: int, count: int) -> int:
    """Rows of a tile: about as many as a group has, more where few rows cost no more than one."""
    least = 16 if compiling_for("tpu") else 8 if compiling_for("cuda") else 1
    if m <= count:
        return least  # what the kernels pad them to
    mean = m / count
    return max(least, min(MAX_TILE, 1 << int(np.ceil(np.log2(max(mean, min(2 * mean, 16)))))))
