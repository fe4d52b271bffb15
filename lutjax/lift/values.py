"""Values within a lifted program: compressed weights with their paths, and dense arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lutjax.arrays import CompressedArray
from lutjax.arrays.typed_shardings import logical_sharding
from pallas_kernels.manual_axes import vary_over, varying_axes


@dataclasses.dataclass(frozen=True)
class Weight:
    """A compressed value within the evaluation, and the parameter path that it came from."""

    array: CompressedArray
    path: str

    @property
    def logical(self) -> jax.ShapeDtypeStruct:
        """The type of the dense array that it stands for, as JAX's type system sees it."""
        array = self.array
        leaves = jax.tree.leaves(array)
        sharding, kind = logical_sharding(array), None
        axes = varying_axes(*leaves)
        if axes:  # within shard_map, types say over which mesh axes a value varies
            like = jax.typeof(vary_over(leaves[0], axes))
            kind = like.manual_axis_type
            if sharding is None:
                spec = PartitionSpec(*[None] * array.ndim)
                sharding = NamedSharding(like.sharding.mesh, spec)
        return jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=sharding, manual_axis_type=kind
        )


def logical(value: Any) -> Any:
    """What a function of dense arrays is traced with in place of ``value``."""
    return value.logical if isinstance(value, Weight) else value


def bind(eqn: Any, operands: list) -> list:
    """Runs an equation on dense operands as it stands."""
    bind_params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bind_params if isinstance(bind_params, tuple) else ((), bind_params)
    result = eqn.primitive.bind(*functions, *operands, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


class Packer:
    """Carries values across a JAX transformation: weights as pytrees, their paths beside them."""

    def __init__(self, values: Sequence[Any]):
        self._paths = [x.path if isinstance(x, Weight) else None for x in values]

    @staticmethod
    def pack(values: Sequence[Any]) -> tuple:
        """The bare arrays, pytrees that any transformation takes."""
        return tuple(x.array if isinstance(x, Weight) else x for x in values)

    def unpack(self, arrays: Sequence[Any]) -> list:
        """The values again, within or after the transformation."""
        return [
            a if path is None else Weight(a, path)
            for a, path in zip(arrays, self._paths, strict=True)
        ]
