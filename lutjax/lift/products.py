"""Primitives that use a weight up: products and lookups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import CompressedArray, is_compressed
from lutjax.lift.registry import NEEDS_DENSE, rule

PRODUCTS = frozenset({"dot_general", "ragged_dot_general"})
"""Primitives whose result is dense and counts as a fused use."""

LOOKUPS = frozenset({"gather", "dynamic_slice", "slice"})
"""Primitives that select: whole weights of a stack stay compressed, rows become dense."""


@rule("dot_general")
def _dot_general(params: dict, lhs: Any, rhs: Any) -> Any:
    if is_compressed(lhs) and is_compressed(rhs):
        return NEEDS_DENSE
    weight_is_lhs = is_compressed(lhs)
    contract, batch = params["dimension_numbers"]
    if weight_is_lhs:
        weight, x = lhs, rhs
        (w_contract, x_contract), (w_batch, x_batch) = contract, batch
    else:
        weight, x = rhs, lhs
        (x_contract, w_contract), (x_batch, w_batch) = contract, batch
    out_dtype = params["preferred_element_type"]
    if not (fits_kernel(x.dtype) and fits_kernel(out_dtype)):
        return NEEDS_DENSE
    plan = plan_product(weight, tuple(w_contract), tuple(w_batch))
    if plan is None:
        return NEEDS_DENSE

    # x as [*weight batch axes it has too, *free, contracted in stored order]
    partner = dict(zip((*w_batch, *w_contract), (*x_batch, *x_contract), strict=True))
    shared = [partner[axis] for axis in plan.shared]
    order = [partner[axis] for axis in plan.contracted]
    free = [axis for axis in range(x.ndim) if axis not in (*shared, *order)]
    free_shape = [x.shape[axis] for axis in free]
    width = int(np.prod([x.shape[axis] for axis in order], dtype=int))
    rows = transposed(x, (*shared, *free, *order))
    count = len(weight.batch_shape)
    if count or len(order) != 1:
        lead = [x.shape[axis] for axis in shared]
        rows = rows.reshape(*lead, int(np.prod(free_shape, dtype=int)), width)
    y = _map_batches(weight, rows, plan, out_dtype)

    # y is [*weight batch axes, rows, result factors in stored order]
    sizes = [weight.shape[axis] for axis in plan.kept]
    y = y.reshape(*weight.batch_shape, *free_shape, *sizes)
    # Where dot_general puts them: batch axes in its order, then free axes of lhs, then of rhs.
    places_free = [count + i for i in range(len(free))]
    kept_places = {axis: count + len(free) + i for i, axis in enumerate(plan.kept)}
    w_free = [axis for axis in range(weight.ndim) if axis not in (*w_contract, *w_batch)]
    places_w = [axis if axis < count else kept_places[axis] for axis in w_free]
    tail = (*places_w, *places_free) if weight_is_lhs else (*places_free, *places_w)
    y = transposed(y, (*w_batch, *plan.summed, *tail))
    if not plan.summed:
        return y
    return y.sum(axis=tuple(range(len(w_batch), len(w_batch) + len(plan.summed))))


def transposed(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """``x`` with its axes in another order."""
    return x if order == tuple(range(x.ndim)) else jax.lax.transpose(x, order)


def fits_kernel(dtype: Any) -> bool:
    """Whether a product that sums in float32 is good enough for a result of ``dtype``."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a dot_general maps onto a product with the stored matrix; axes of the logical weight."""

    shared: tuple[int, ...]  # batch axes of the weight that x has too, ascending
    summed: tuple[int, ...]  # those of them that are contracted
    contracted: tuple[int, ...]  # axes of the matrix, in stored order
    kept: tuple[int, ...]  # in stored order
    transposed: bool


def plan_product(
    weight: CompressedArray, contract: tuple[int, ...], batch: tuple[int, ...]
) -> _Plan | None:
    """How to contract these axes of a weight; None if the stored form cannot."""
    count = len(weight.batch_shape)
    if any(axis >= count for axis in batch):
        return None
    k_axes = tuple(count + axis for axis in weight.view.k_axes)
    n_axes = tuple(count + axis for axis in weight.view.n_axes)
    summed = tuple(axis for axis in contract if axis < count)
    shared = tuple(sorted((*batch, *summed)))
    inner = {axis for axis in contract if axis >= count}
    if _same_but_units(weight, inner, k_axes):
        kept = tuple(axis for axis in (*n_axes, *k_axes) if axis not in inner)
        return _Plan(shared, summed, _ordered(k_axes, inner), kept, transposed=False)
    if _same_but_units(weight, inner, n_axes):
        kept = tuple(axis for axis in (*k_axes, *n_axes) if axis not in inner)
        return _Plan(shared, summed, _ordered(n_axes, inner), kept, transposed=True)
    return None


def _same_but_units(weight: CompressedArray, axes: set[int], side: tuple[int, ...]) -> bool:
    """Whether ``axes`` are all those of a side, axes of size one aside."""
    return all(weight.shape[axis] == 1 for axis in axes.symmetric_difference(side))


def _ordered(side: tuple[int, ...], axes: set[int]) -> tuple[int, ...]:
    return (*[a for a in side if a in axes], *sorted(axes.difference(side)))


def _map_batches(
    weight: CompressedArray, rows: jax.Array, plan: _Plan, out_dtype: Any
) -> jax.Array:
    """``rows @ weight`` with the weight's batch axes leading; rows has those in ``plan.shared``."""

    def product(weight: Any, rows: jax.Array, axis: int) -> jax.Array:
        if axis == count:
            multiply = weight.matmul_transposed if plan.transposed else weight.matmul
            return multiply(rows, out_dtype=out_dtype)
        in_axes = (0, 0 if axis in plan.shared else None)
        return jax.vmap(lambda w, x: product(w, x, axis + 1), in_axes=in_axes)(weight, rows)

    count = len(weight.batch_shape)
    return product(weight, rows, 0)


@rule("gather")
def _gather(params: dict, weight: Any, indices: Any) -> Any:
    if not is_compressed(weight) or is_compressed(indices):
        return NEEDS_DENSE
    numbers, sizes = params["dimension_numbers"], tuple(params["slice_sizes"])
    batched = tuple(numbers.operand_batching_dims)
    mode = jax.lax.GatherScatterMode.from_any(params["mode"])
    fills = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    # A start along an axis that is taken whole can only be zero, unless it asks for filling.
    places = [
        i
        for i, axis in enumerate(numbers.start_index_map)
        if fills or sizes[axis] != weight.shape[axis]
    ]
    if len(places) != 1:
        return NEEDS_DENSE
    (place,) = places
    axis = numbers.start_index_map[place]
    # The axis itself may stay in the result with size one, as vmapped dynamic slices have it.
    stays = tuple(numbers.collapsed_slice_dims) == ()
    if not stays and tuple(numbers.collapsed_slice_dims) != (axis,):
        return NEEDS_DENSE
    whole = all(
        size == (1 if i == axis or i in batched else weight.shape[i])
        for i, size in enumerate(sizes)
    )
    if not whole:
        return NEEDS_DENSE
    index, limit = _wide(indices[..., place]), weight.shape[axis]
    inside = (index >= 0) & (index < limit)
    index = jnp.clip(index, 0, limit - 1)
    if axis < len(weight.batch_shape):
        if fills or batched or (axis and index.ndim):  # it cannot be filled with NaN
            return NEEDS_DENSE
        lead = tuple(range(index.ndim))
        if any(place in lead for place in numbers.offset_dims):
            return NEEDS_DENSE

        def choose(a: jax.Array) -> jax.Array:
            chosen = jnp.take(a, index, axis=axis, mode="clip")
            return jnp.expand_dims(chosen, index.ndim + axis) if stays else chosen

        return jax.tree.map(choose, weight)
    if batched != tuple(range(len(weight.batch_shape))) or batched != tuple(
        numbers.start_indices_batching_dims
    ):
        return NEEDS_DENSE
    slices = _take(weight, index, axis - len(batched))
    if slices is None:
        return NEEDS_DENSE
    if fills:
        fill = params["fill_value"]
        # NumPy's, as debug_nans looks at what JAX makes.
        fill = np.asarray(np.nan if fill is None else fill).astype(slices.dtype)
        inside = inside.reshape(inside.shape + (1,) * (slices.ndim - inside.ndim))
        slices = jnp.where(inside, slices, fill)
    if stays:
        slices = jnp.expand_dims(slices, index.ndim + axis - len(batched))
    # The axes of the indices come first in ``slices``; gather spreads them around offset_dims.
    rest = [i for i in range(slices.ndim) if i not in numbers.offset_dims]
    return jnp.moveaxis(slices, range(len(rest)), rest)


def _wide(index: jax.Array) -> jax.Array:
    """An index that holds every place: places in the stored matrix do not fit eight bits."""
    return index if jnp.iinfo(index.dtype).bits >= 32 else index.astype(jnp.int32)


def _take(weight: CompressedArray, index: jax.Array, axis: int) -> jax.Array | None:
    """Dense slices along a matrix axis, ``[*batch, *index, ...]``; leading axes are mapped."""
    if weight.batch_shape:
        found = weight.outer_axis(axis)
        if found is None or found[1] != 1:
            return None
        return jax.vmap(lambda w, i: _take(w, i, axis))(weight, index)
    order = [axis, *(i for i in range(weight.ndim) if i != axis)]
    return weight.transpose(order).take_slices(index)


@rule("dynamic_slice")
def _dynamic_slice(params: dict, weight: Any, *starts: Any) -> Any:
    if not is_compressed(weight) or any(is_compressed(s) for s in starts):
        return NEEDS_DENSE
    sizes = tuple(params["slice_sizes"])
    count = len(weight.batch_shape)
    cut = [axis for axis in range(count, weight.ndim) if sizes[axis] != weight.shape[axis]]
    if len(cut) > 1:
        return NEEDS_DENSE
    result = _slice_batch(weight, starts, sizes)
    if not cut:
        return result
    (axis,) = cut
    # dynamic_slice moves a start that is too large back into the array.
    start = jnp.clip(_wide(starts[axis]), 0, weight.shape[axis] - sizes[axis])
    part = result.slice_axis(axis - count, start, sizes[axis])
    if part is not None:
        return part
    if sizes[axis] == 1 and not count:  # one row, as of an embedding
        row = take_one(weight, start, axis)
        return NEEDS_DENSE if row is None else row
    return NEEDS_DENSE


def take_one(weight: CompressedArray, index: jax.Array, axis: int) -> jax.Array | None:
    """One dense slice along an axis, which stays with size one; None if it cannot be had alone."""
    row = _take(weight, index[None], axis)
    return None if row is None else jnp.moveaxis(row, 0, axis)


def _slice_batch(weight: CompressedArray, starts: tuple, sizes: tuple[int, ...]) -> Any:
    count = len(weight.batch_shape)
    if sizes[:count] == weight.batch_shape:
        return weight

    def cut(a: jax.Array) -> jax.Array:
        zero = jnp.zeros((), starts[0].dtype)
        begin = (*starts[:count], *[zero] * (a.ndim - count))
        return jax.lax.dynamic_slice(a, begin, (*sizes[:count], *a.shape[count:]))

    return jax.tree.map(cut, weight)
