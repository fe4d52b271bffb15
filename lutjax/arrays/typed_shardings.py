"""Compressed weights on meshes with explicit axes, whose shardings are part of JAX's types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lutjax.arrays.base import CompressedArray, is_compressed
from lutjax.arrays.sharding import logical_spec, part_specs
from lutjax.arrays.split import explicit_mesh


def logical_sharding(array: CompressedArray) -> NamedSharding | None:
    """The typed sharding of the dense weight, None without explicit axes."""
    mesh = explicit_mesh(array)
    return None if mesh is None else NamedSharding(mesh, logical_spec(array))


def compress_with_auto_axes(
    compress: Callable[..., Any], path: str, weight: Any, *operands: Any
) -> Any:
    """``compress(weight, *operands)``; with explicit axes the result is sharded as the weight is.

    Args:
      compress: Returns a pytree whose compressed arrays stand for the weight; its other arrays are
        replicated.
      path: Of the weight, for errors.
      weight: The dense weight.
      *operands: Pytrees of arrays.

    Raises:
      ValueError: If a compressed array cannot be split as the weight is.
    """
    mesh = explicit_mesh(weight)
    if mesh is None:
        return compress(weight, *operands)
    spec = jax.typeof(weight).sharding.spec

    def place(leaf: Any) -> Any:
        try:
            specs = part_specs(leaf, spec, mesh.shape) if is_compressed(leaf) else PartitionSpec()
        except ValueError as error:
            raise ValueError(f"{path!r} {leaf!r} sharded by {spec}: {error}") from error
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def shardings(result: Any) -> Any:
        return jax.tree.map(place, result, is_leaf=is_compressed)

    return place_with_auto_axes(compress, [weight, *operands], shardings)


def place_with_auto_axes(
    compute: Callable[..., Any], operands: Sequence[Any], shardings: Callable[[Any], Any]
) -> Any:
    """Like :func:`run_with_auto_axes`, with shardings that depend on the shapes of the result.

    Args:
      compute: What to run.
      operands: Pytrees of arrays, one of them at least with explicit axes.
      shardings: From the result with ``jax.ShapeDtypeStruct`` for arrays to a sharding for each.
    """
    everywhere = NamedSharding(explicit_mesh(operands), PartitionSpec())
    replicated = jax.sharding.auto_axes(compute, out_sharding=everywhere)
    wanted = shardings(jax.eval_shape(replicated, *operands))
    return jax.sharding.auto_axes(compute, out_sharding=wanted)(*operands)


def run_with_auto_axes(
    compute: Callable[..., jax.Array], operands: Sequence[Any], out_sharding: NamedSharding
) -> jax.Array:
    """Runs ``compute(*operands)`` with the compiler in charge of sharding; types the result.

    Kernels mix axes in ways that typed shardings cannot follow.
    """
    return jax.sharding.auto_axes(compute, out_sharding=out_sharding)(*operands)
