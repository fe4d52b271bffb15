"""What primitives do with a compressed operand.

A rule takes the primitive's parameters and its operands, of which at least one is compressed, and
returns the result, dense or compressed; or :data:`NEEDS_DENSE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import CompressedArray, SumArray, is_compressed


class _NeedsDense:
    def __repr__(self) -> str:
        return "NEEDS_DENSE"


NEEDS_DENSE = _NeedsDense()

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""Rules by the name of the primitive."""

PRODUCTS = frozenset({"dot_general", "gather"})
"""Primitives that use a weight up; all others give a compressed weight again."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives ``names``."""

    def register(fn: Rule) -> Rule:
        for name in names:
            RULES[name] = fn
        return fn

    return register


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
    out_dtype = params["preferred_element_type"] or jnp.result_type(lhs.dtype, rhs.dtype)
    if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(out_dtype, jnp.floating)):
        return NEEDS_DENSE
    plan = _plan(weight, tuple(w_contract), tuple(w_batch))
    if plan is None:
        return NEEDS_DENSE

    # x as [*weight batch axes it shares, *free, contracted in stored order]
    shared = [x_batch[w_batch.index(axis)] for axis in plan.shared]
    order = [x_contract[w_contract.index(axis)] for axis in plan.contracted]
    free = [axis for axis in range(x.ndim) if axis not in (*shared, *order)]
    free_shape = [x.shape[axis] for axis in free]
    width = int(np.prod([x.shape[axis] for axis in order]))
    if jnp.finfo(out_dtype).bits > jnp.finfo(x.dtype).bits:
        x = x.astype(out_dtype)
    rows = x.transpose((*shared, *free, *order))
    rows = rows.reshape(*[x.shape[axis] for axis in shared], -1, width)
    count = len(weight.batch_shape)
    y = _map_batches(weight, rows, plan)

    # y is [*weight batch axes, rows, result factors in stored order]
    sizes = [weight.shape[axis] for axis in plan.kept]
    lead = list(weight.batch_shape)
    y = y.reshape(*lead, *free_shape, *sizes).astype(out_dtype)
    # Where dot_general puts them: batch axes in its order, then free axes of lhs, then of rhs.
    places_free = [count + i for i in range(len(free))]
    kept_places = {axis: count + len(free) + i for i, axis in enumerate(plan.kept)}
    w_free = [axis for axis in range(weight.ndim) if axis not in (*w_contract, *w_batch)]
    places_w = [axis if axis < count else kept_places[axis] for axis in w_free]
    places_batch = list(w_batch)
    tail = (places_w, places_free) if weight_is_lhs else (places_free, places_w)
    return y.transpose((*places_batch, *tail[0], *tail[1]))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a dot_general maps onto a product with the stored matrix; axes of the logical weight."""

    shared: tuple[int, ...]  # batch axes that x has too, ascending
    contracted: tuple[int, ...]  # in stored order
    kept: tuple[int, ...]  # in stored order
    transposed: bool


def _plan(weight: CompressedArray, contract: tuple[int, ...], batch: tuple[int, ...]) -> Any:
    count = len(weight.batch_shape)
    if any(axis >= count for axis in batch):
        return None
    k_axes = tuple(count + axis for axis in weight.view.k_axes)
    n_axes = tuple(count + axis for axis in weight.view.n_axes)
    shared = tuple(sorted(batch))
    if set(contract) == set(k_axes):
        return _Plan(shared, k_axes, n_axes, transposed=False)
    if set(contract) == set(n_axes):
        return _Plan(shared, n_axes, k_axes, transposed=True)
    return None


def _map_batches(weight: CompressedArray, rows: jax.Array, plan: _Plan) -> jax.Array:
    """``rows @ weight`` with the weight's batch axes leading; rows has those in ``plan.shared``."""

    def product(weight, rows, axis):
        if axis == count:
            return weight.matmul_transposed(rows) if plan.transposed else weight.matmul(rows)
        in_axes = (0, 0 if axis in plan.shared else None)
        return jax.vmap(lambda w, x: product(w, x, axis + 1), in_axes=in_axes)(weight, rows)

    count = len(weight.batch_shape)
    return product(weight, rows, 0)


@rule("gather")
def _gather(params: dict, weight: Any, indices: Any) -> Any:
    if not is_compressed(weight) or is_compressed(indices):
        return NEEDS_DENSE
    numbers = params["dimension_numbers"]
    whole_rows = tuple(params["slice_sizes"]) == (1, *weight.shape[1:])
    trailing = tuple(range(indices.ndim - 1, indices.ndim - 1 + weight.ndim - 1))
    if not (
        whole_rows
        and not weight.batch_shape
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.offset_dims) == trailing
        and not numbers.operand_batching_dims
    ):
        return NEEDS_DENSE
    index = indices[..., 0]
    mode = jax.lax.GatherScatterMode.from_any(params["mode"])
    rows = weight.take(jnp.clip(index, 0, weight.shape[0] - 1))
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = params["fill_value"]
        fill = jnp.asarray(jnp.nan if fill is None else fill, rows.dtype)
        inside = (index >= 0) & (index < weight.shape[0])
        rows = jnp.where(inside.reshape(inside.shape + (1,) * (weight.ndim - 1)), rows, fill)
    return rows


@rule("transpose")
def _transpose(params: dict, weight: CompressedArray) -> Any:
    try:
        return weight.transpose(params["permutation"])
    except ValueError:  # a batch axis would move
        return NEEDS_DENSE


@rule("reshape")
def _reshape(params: dict, weight: CompressedArray) -> Any:
    return _or_dense(weight.reshape(params["new_sizes"]))


@rule("squeeze")
def _squeeze(params: dict, weight: CompressedArray) -> Any:
    drop = params["dimensions"]
    return _or_dense(weight.reshape([s for i, s in enumerate(weight.shape) if i not in drop]))


@rule("expand_dims")
def _expand_dims(params: dict, weight: CompressedArray) -> Any:
    shape = list(weight.shape)
    for axis in sorted(params["dimensions"]):
        shape.insert(axis, 1)
    return _or_dense(weight.reshape(shape))


@rule("broadcast_in_dim")
def _broadcast_in_dim(params: dict, weight: CompressedArray, *dynamic: Any) -> Any:
    shape, places = params["shape"], params["broadcast_dimensions"]
    only_units = all(shape[p] == size for p, size in zip(places, weight.shape, strict=True))
    only_units &= all(size == 1 for i, size in enumerate(shape) if i not in places)
    return _or_dense(weight.reshape(shape)) if only_units and not dynamic else NEEDS_DENSE


@rule("convert_element_type")
def _convert(params: dict, weight: CompressedArray) -> Any:
    dtype = params["new_dtype"]
    return weight.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else NEEDS_DENSE


@rule("copy", "copy_p")
def _copy(params: dict, weight: CompressedArray) -> Any:
    return weight


@rule("optimization_barrier")
def _optimization_barrier(params: dict, *operands: Any) -> Any:
    return jax.lax.optimization_barrier(operands)


@rule("slice")
def _slice(params: dict, weight: CompressedArray) -> Any:
    strides = params["strides"] or (1,) * weight.ndim
    starts, limits = params["start_indices"], params["limit_indices"]
    count = len(weight.batch_shape)
    result = weight
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, weight.shape[axis], 1):
            continue
        if axis < count:
            cut = _slicer(start, limit, stride, axis)
            result = jax.tree.map(cut, result)
            continue
        side = _sole_axis(weight, axis - count)
        if side is None or stride != 1:
            return NEEDS_DENSE
        part = result.slice_matrix(side, start, limit - start)
        if part is None:
            return NEEDS_DENSE
        result = part
    return result


@rule("dynamic_slice")
def _dynamic_slice(params: dict, weight: Any, *starts: Any) -> Any:
    if not is_compressed(weight) or any(is_compressed(s) for s in starts):
        return NEEDS_DENSE
    sizes = params["slice_sizes"]
    count = len(weight.batch_shape)
    if tuple(sizes[count:]) != weight.shape[count:]:
        return NEEDS_DENSE  # where K is cut is not known, so groups may be cut too

    def cut(a: jax.Array) -> jax.Array:
        zero = jnp.zeros((), starts[0].dtype)
        begin = (*starts[:count], *[zero] * (a.ndim - count))
        return jax.lax.dynamic_slice(a, begin, (*sizes[:count], *a.shape[count:]))

    return jax.tree.map(cut, weight)


@rule("add", "add_any")
def _add(params: dict, lhs: Any, rhs: Any) -> Any:
    if not (is_compressed(lhs) and is_compressed(rhs)) or lhs.view != rhs.view:
        return NEEDS_DENSE
    return SumArray.of(lhs, rhs)


def _slicer(start: int, limit: int, stride: int, axis: int) -> Callable[[jax.Array], jax.Array]:
    return lambda a: jax.lax.slice_in_dim(a, start, limit, stride, axis)


def _sole_axis(weight: CompressedArray, axis: int) -> str | None:
    """``"k"`` or ``"n"`` if the logical axis is all of that side of the stored matrix."""
    if weight.view.k_axes == (axis,):
        return "k"
    return "n" if weight.view.n_axes == (axis,) else None


def _or_dense(result: Any) -> Any:
    return NEEDS_DENSE if result is None else result
