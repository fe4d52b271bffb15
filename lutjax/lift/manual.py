"""``shard_map`` inside a lifted function."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from lutjax.arrays.sharding import part_specs
from lutjax.lift.registry import NEEDS_DENSE
from lutjax.lift.values import Packer, Weight


def shard_map(eqn: Any, operands: list, evaluator: Any) -> Any:
    """Re-emits shard_map; each part of a weight is split as the dense weight would be."""
    params = eqn.params
    mesh, body = params["mesh"], params["jaxpr"]
    in_specs, values = [], []
    for x, spec, local in zip(operands, params["in_specs"], body.invars, strict=True):
        if isinstance(x, Weight):
            try:
                specs = part_specs(x.array, spec, mesh.shape)
            except ValueError:
                specs = None
            if specs is None or _local_shape(x.array, specs, mesh) != local.aval.shape:
                x = evaluator.dense(x, "shard_map", eqn)
            else:
                spec = specs
                if AxisType.Explicit in mesh.axis_types:
                    x = Weight(jax.tree.map(jax.reshard, x.array, specs), x.path)
        in_specs.append(spec)
        values.append(x)
    if not any(isinstance(x, Weight) for x in values):
        return NEEDS_DENSE
    packer = Packer(values)

    def run(*arrays: Any) -> tuple:
        out = evaluator(body, (), packer.unpack(arrays))
        return tuple(evaluator.dense(y, "shard_map output", eqn) for y in out)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(in_specs),
        out_specs=params["out_specs"],
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    return list(mapped(*packer.pack(values)))


def _local_shape(array: Any, specs: Any, mesh: Any) -> tuple[int, ...] | None:
    """The logical shape of one shard; None if its parts do not fit each other."""

    def shard(a: jax.Array, spec: Any) -> jax.ShapeDtypeStruct:
        shape = list(a.shape)
        for axis, entry in enumerate(spec):
            names = () if entry is None else (entry,) if isinstance(entry, str) else entry
            for name in names:
                shape[axis] //= mesh.shape[name]
        return jax.ShapeDtypeStruct(shape, a.dtype)

    local = jax.tree.map(shard, array, specs)
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    try:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            jax.eval_shape(lambda a: a.materialize(), local)
    except (ValueError, TypeError):
        return None
    return local.shape
