"""Primitives that rearrange a weight: their result is compressed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lutjax.arrays import (
    CompressedArray,
    ConcatArray,
    SumArray,
    is_compressed,
    shardings_like,
)
from lutjax.arrays.sharding import part_specs
from lutjax.lift import products, ragged  # noqa: F401: they register their rules
from lutjax.lift.registry import NEEDS_DENSE, rule
from pallas_kernels.manual_axes import vary_over

DENSE_RULES = {"ragged_dot_general": ragged.dense_ragged_dot}
"""What runs better by a rule even where no operand is compressed."""


@rule("transpose")
def _transpose(params: dict, weight: CompressedArray) -> Any:
    try:
        return weight.transpose(params["permutation"])
    except ValueError:  # a batch axis would move
        return NEEDS_DENSE


@rule("reshape")
def _reshape(params: dict, weight: CompressedArray, *dynamic: Any) -> Any:
    return NEEDS_DENSE if dynamic else _or_dense(weight.reshape(params["new_sizes"]))


@rule("squeeze")
def _squeeze(params: dict, weight: CompressedArray) -> Any:
    drop = params["dimensions"]
    return _or_dense(weight.reshape([s for i, s in enumerate(weight.shape) if i not in drop]))


@rule("broadcast_in_dim")
def _broadcast_in_dim(params: dict, weight: CompressedArray, *dynamic: Any) -> Any:
    shape, places = params["shape"], params["broadcast_dimensions"]
    only_units = all(shape[p] == size for p, size in zip(places, weight.shape, strict=True))
    only_units &= all(size == 1 for i, size in enumerate(shape) if i not in places)
    return _or_dense(weight.reshape(shape)) if only_units and not dynamic else NEEDS_DENSE


@rule("convert_element_type")
def _convert(params: dict, weight: CompressedArray) -> Any:
    dtype = params["new_dtype"]
    # Whoever casts to fewer bits wants the rounding; a float type of 16 bits only saves memory.
    passes = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    return weight.astype(dtype) if passes else NEEDS_DENSE


@rule("copy")
def _copy(params: dict, weight: CompressedArray) -> Any:
    return weight


@rule("stop_gradient")
def _stop_gradient(params: dict, weight: CompressedArray) -> Any:
    return jax.lax.stop_gradient(weight)


@rule("name")
def _name(params: dict, weight: CompressedArray) -> Any:
    return jax.tree.map(lambda a: checkpoint_name(a, params["name"]), weight)


@rule("pvary")
def _pvary(params: dict, weight: CompressedArray) -> Any:
    """Within shard_map: the parts come to vary over more mesh axes, as the dense weight would."""
    axes = frozenset(params["axes"])
    return jax.tree.map(lambda a: vary_over(a, axes), weight)


@rule("sharding_constraint")
def _sharding_constraint(params: dict, weight: CompressedArray) -> Any:
    """A constraint on the dense weight becomes one on its parts, where it can be split so."""
    try:
        shardings = shardings_like(weight, params["sharding"])
    except ValueError:  # the parts stay where they are, which is as correct
        return weight
    return jax.lax.with_sharding_constraint(weight, shardings)


@rule("optimization_barrier")
def _optimization_barrier(params: dict, *operands: Any) -> Any:
    return jax.lax.optimization_barrier(operands)


@rule("reshard")
def _reshard(params: dict, weight: CompressedArray) -> Any:
    sharding = params["dst_sharding"]
    try:
        specs = part_specs(weight, sharding.spec, sharding.mesh.shape)
    except ValueError:
        return NEEDS_DENSE
    return jax.tree.map(jax.reshard, weight, specs)


@rule("slice")
def _slice(params: dict, weight: CompressedArray) -> Any:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * weight.ndim
    result = _cut(weight, starts, limits, strides)
    if result is not None or weight.batch_shape:
        return _or_dense(result)
    cut = [i for i in range(weight.ndim) if (starts[i], limits[i]) != (0, weight.shape[i])]
    if len(cut) == 1 and limits[cut[0]] - starts[cut[0]] == 1:  # one row, as of an embedding
        return _or_dense(products.take_one(weight, jnp.int32(starts[cut[0]]), cut[0]))
    return NEEDS_DENSE


@rule("split")
def _split(params: dict, weight: CompressedArray) -> Any:
    axis, start = params["axis"], 0
    pieces = []
    for size in params["sizes"]:
        starts, limits = [0] * weight.ndim, list(weight.shape)
        starts[axis], limits[axis] = start, start + int(size)
        pieces.append(_cut(weight, starts, limits, (1,) * weight.ndim))
        start += int(size)
    return NEEDS_DENSE if any(piece is None for piece in pieces) else pieces


@rule("unstack")
def _unstack(params: dict, weight: CompressedArray) -> Any:
    axis = params["axis"]
    if axis >= len(weight.batch_shape):
        return NEEDS_DENSE
    return [
        jax.tree.map(lambda a, i=i: jax.lax.index_in_dim(a, i, axis, keepdims=False), weight)
        for i in range(weight.shape[axis])
    ]


def _cut(
    weight: CompressedArray, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> CompressedArray | None:
    """A static slice in compressed form; None if it is packed together with other rows."""
    count = len(weight.batch_shape)
    result: Any = weight
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, weight.shape[axis], 1):
            continue
        if axis < count:
            bounds = (start, limit, stride, axis)
            result = jax.tree.map(lambda a, b=bounds: jax.lax.slice_in_dim(a, *b), result)
            continue
        result = result.slice_axis(axis - count, start, limit - start) if stride == 1 else None
        if result is None:
            return None
    return result


@rule("concatenate")
def _concatenate(params: dict, *operands: Any) -> Any:
    if not all(map(is_compressed, operands)):
        return NEEDS_DENSE
    axis, first = params["dimension"], operands[0]
    count = len(first.batch_shape)
    if len({len(w.batch_shape) for w in operands}) == 1 and axis >= count:
        found = first.outer_axis(axis - count)
        sizes = {w.shape[axis] for w in operands}
        parts = [w.deriving(axis - count) for w in operands]
        alike = len({(w.view, w.dtype) for w in parts}) == 1
        if found is not None and alike and sizes != {1}:
            return ConcatArray.of(*parts, axis=found[0]).deriving()
    if axis:
        return NEEDS_DENSE
    if first.batch_shape:
        return _join(operands)
    # As jnp.stack used to do: a leading axis of size one becomes a batch axis.
    inner = [w.reshape(w.shape[1:]) for w in operands]
    if any(w is None for w in inner):
        return NEEDS_DENSE
    return _join([jax.tree.map(lambda a: a[None], w) for w in inner])


@rule("stack")
def _stack(params: dict, *operands: Any) -> Any:
    if not all(map(is_compressed, operands)) or params["axis"]:
        return NEEDS_DENSE
    return _join([jax.tree.map(lambda a: a[None], w) for w in operands])


def _join(operands: Sequence[CompressedArray]) -> Any:
    """Weights joined along their first batch axis."""
    kinds = {
        (jax.tree.structure(w), *((a.shape[1:], a.dtype) for a in jax.tree.leaves(w)))
        for w in operands
    }
    if len(kinds) > 1:
        return NEEDS_DENSE
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *operands)


@rule("add", "add_any")
def _add(params: dict, lhs: Any, rhs: Any) -> Any:
    if not (is_compressed(lhs) and is_compressed(rhs)):
        return NEEDS_DENSE
    if lhs.view != rhs.view or lhs.shape != rhs.shape:
        return NEEDS_DENSE
    return SumArray.of(lhs, rhs)


def _or_dense(result: Any) -> Any:
    return NEEDS_DENSE if result is None else result
