"""Arrays on meshes: over which manual axes they vary, and whether the compiler splits them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType


def in_manual_axes() -> bool:
    """Whether this is traced inside ``shard_map``."""
    return bool(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))


def varying_axes(*arrays: Any) -> frozenset:
    """The manual mesh axes over which any of ``arrays`` varies; empty outside ``shard_map``."""
    kinds = (jax.typeof(a).manual_axis_type for a in arrays if a is not None)
    return frozenset().union(*(kind.varying for kind in kinds))


def vary_over(array: jax.Array, axes: frozenset) -> jax.Array:
    """Marks ``array`` as varying over ``axes`` too; its gradient is then summed over them."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def shape_struct(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output that varies over the same axes as the operand ``like``."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def is_partitioned_automatically(array: Any) -> bool:
    """Whether the compiler splits the work on ``array`` over several devices.

    It can split XLA's own operations, but would gather the operands of a kernel.
    """
    mesh: Any = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    if mesh is None:
        return False
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)
