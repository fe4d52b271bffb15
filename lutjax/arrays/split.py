"""How a stored matrix is split over a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from lutjax.tracing import is_traced


@dataclasses.dataclass(frozen=True)
class Split:
    """Mesh axes over which a stored matrix ``[*batch, K, N]`` is split.

    Attributes:
      batch: An entry of a partition spec for each batch axis.
      k: The entry for the rows.
      n: The entry for the columns.
      sizes: Number of shards by name of the mesh axis.
    """

    batch: tuple[Any, ...]
    k: Any
    n: Any
    sizes: Mapping[str, int]

    def shards(self, entry: Any) -> int:
        """Into how many pieces an entry splits its axis."""
        if entry is None:
            return 1
        if entry is PartitionSpec.UNCONSTRAINED:
            raise ValueError("PartitionSpec.UNCONSTRAINED does not say how to split a weight")
        names = (entry,) if isinstance(entry, str) else tuple(entry)
        return math.prod(self.sizes[name] for name in names)

    def spec(self, *entries: Any) -> Any:
        """The ``PartitionSpec`` that stands for a data field: batch axes, then ``entries``."""
        return PartitionSpec(*self.batch, *entries)


def typed_entries(array: Any) -> tuple[Any, ...]:
    """An entry for each axis of an array: over which explicit mesh axes it is split."""
    spec = jax.typeof(array).sharding.spec
    return (*spec, *[None] * (array.ndim - len(spec)))


def explicit_mesh(tree: Any) -> Any:
    """The mesh over whose explicit axes an array of ``tree`` is typed, or None.

    With its devices unless the array is traced, as arrays without a mesh can only be put there.
    """
    for leaf in jax.tree.leaves(tree):
        # Asking a tracer for its own sharding is an error, whose message takes long to make.
        owner = jax.typeof(leaf) if is_traced(leaf) else leaf
        mesh = getattr(getattr(owner, "sharding", None), "mesh", None)
        if AxisType.Explicit in getattr(mesh, "axis_types", ()):
            return mesh
    return None
