"""Compressed weights on meshes with explicit axes, whose shardings are part of JAX's types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.sharding import logical_spec
from lutjax.arrays.split import explicit_mesh


def logical_sharding(array: CompressedArray) -> NamedSharding | None:
    """The typed sharding of the dense weight, None without explicit axes."""
    mesh = explicit_mesh(array)
    return None if mesh is None else NamedSharding(mesh, logical_spec(array))


def run_with_auto_axes(
    compute: Callable[..., jax.Array], operands: Sequence[Any], out_sharding: NamedSharding
) -> jax.Array:
    """Runs ``compute(*operands)`` with the compiler in charge of sharding; types the result.

    Kernels mix axes in ways that typed shardings cannot follow.
    """
    return jax.sharding.auto_axes(compute, out_sharding=out_sharding)(*operands)
