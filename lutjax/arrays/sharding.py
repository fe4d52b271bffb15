"""How the parts of a compressed weight are sharded when the weight itself is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lutjax.arrays.base import CompressedArray, is_compressed
from lutjax.arrays.split import Split


def shardings_like(params: Any, dense_shardings: Any) -> Any:
    """Shardings of compressed parameters, derived from those of the dense ones.

    Columns of the stored matrix may be split anywhere, rows at whole blocks of eight; a scale or a
    table that several shards share is replicated. The result serves ``jax.device_put`` and
    ``jax.jit(in_shardings=...)``; its specs (``sharding.spec``) serve ``jax.shard_map``, where
    shards of weights with quantised scales must hold whole blocks of eight groups of rows, and of
    the scales that share a step.

    Args:
      params: Parameters, compressed or dense, or their ``jax.eval_shape``.
      dense_shardings: A pytree with a ``jax.sharding.Sharding`` for each parameter, as the dense
        parameters had it. Those that are no ``NamedSharding`` are used for every part.

    Returns:
      A pytree like ``params`` with a sharding for each array in it.

    Raises:
      ValueError: If a weight cannot be split as its dense form was; names the parameter path.

    >>> import jax.numpy as jnp, lutjax
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> params = lutjax.quantize({"kernel": jnp.ones((64, 32))}, bits=4, group_size=32)
    >>> by_columns = {"kernel": NamedSharding(mesh, PartitionSpec(None, "model"))}
    >>> shardings_like(params, by_columns)["kernel"].words.spec
    P(None, None, 'model')
    """

    def convert(path: tuple, leaf: Any, sharding: Any) -> Any:
        if not is_compressed(leaf):
            return sharding
        if not isinstance(sharding, NamedSharding):
            return jax.tree.map(lambda _: sharding, leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the weight"
        try:
            specs = part_specs(leaf, sharding.spec, sharding.mesh.shape)
        except ValueError as error:
            raise ValueError(f"{name} {leaf!r} sharded by {sharding.spec}: {error}") from error

        def place(spec: PartitionSpec) -> NamedSharding:
            return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

        return jax.tree.map(place, specs, is_leaf=_is_spec)

    return jax.tree_util.tree_map_with_path(convert, params, dense_shardings, is_leaf=is_compressed)


def part_specs(array: CompressedArray, spec: PartitionSpec, sizes: Mapping[str, int]) -> Any:
    """Partition specs of the data fields of a weight that is sharded by ``spec``.

    Args:
      array: The weight.
      spec: Partition spec of its logical axes.
      sizes: Number of shards by name of the mesh axis.

    Raises:
      ValueError: If the weight cannot be split that way; says what can be done.
    """
    count = len(array.batch_shape)
    if len(spec) > array.ndim:
        raise ValueError(f"the spec is for {len(spec)} axes, but the weight has {array.ndim}")
    entries = [*spec, *[None] * (array.ndim - len(spec))]
    split = Split(
        tuple(entries[:count]),
        _outermost(array, entries, array.view.k_axes, "K"),
        _outermost(array, entries, array.view.n_axes, "N"),
        sizes,
    )
    return array.split_specs(split)


def _outermost(array: CompressedArray, entries: list, axes: tuple[int, ...], side: str) -> Any:
    """The mesh axes that shard a side of the stored matrix."""
    count = len(array.batch_shape)
    named = [(array.shape[count + axis], entries[count + axis], count + axis) for axis in axes]
    named = [item for item in named if item[0] > 1]
    for place, (_, entry, axis) in enumerate(named):
        if entry is not None and place:
            raise ValueError(
                f"axis {axis} is not the outermost of those that make up {side}, so its shards "
                f"are not contiguous in the stored matrix; shard axis {named[0][2]} instead"
            )
    return named[0][1] if named else None


def logical_spec(array: CompressedArray) -> PartitionSpec:
    """Partition spec of the logical axes, read off the types of the data fields."""
    batch, k, n = array.typed_spec()
    view = array.view
    inner: list[Any] = [None] * len(view.order)
    sizes = array.shape[len(array.batch_shape) :]
    for axes, entry in ((view.k_axes, k), (view.n_axes, n)):
        outer = next((axis for axis in axes if sizes[axis] > 1), None)
        if outer is not None:
            inner[outer] = entry
    return PartitionSpec(*batch, *inner)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
