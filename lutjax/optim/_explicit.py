"""Transformations on meshes with explicit axes, whose shardings are part of JAX's types.

Decompositions, selected entries and packed codes mix axes in ways that typed shardings cannot
follow, so the compiler is left in charge of them there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lutjax.arrays.sharding import part_specs
from lutjax.arrays.split import explicit_mesh
from lutjax.arrays.typed_shardings import place_with_auto_axes
from lutjax.optim._state import is_coded
from lutjax.paths import path_string


def init_with_auto_axes(init: Callable[[Any], Any], params: Any) -> Any:
    """`init(params)`; with explicit axes the state is sharded as the parameters are.

    That is what it keeps for each of them, along axes of the parameter's size; all else is
    replicated, such as maps, and codes that cannot be split so.
    """
    mesh = explicit_mesh(params)
    if mesh is None:
        return init(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    owners = {path_string(path): jax.typeof(leaf) for path, leaf in leaves}

    def spec_of(path: Any, leaf: Any) -> PartitionSpec:
        inner = (path_string(path[i:]) for i in range(len(path) + 1))
        owner = next((owners[name] for name in inner if name in owners), None)
        if owner is None or owner.ndim != leaf.ndim:
            return PartitionSpec()
        entries = zip(owner.sharding.spec, owner.shape, leaf.shape, strict=True)
        return PartitionSpec(*(entry if a == b else None for entry, a, b in entries))

    def place(path: Any, leaf: Any) -> Any:
        specs = spec_of(path, leaf)
        if is_coded(leaf):
            try:
                specs = part_specs(leaf, specs, mesh.shape)
            except ValueError:
                specs = jax.tree.map(lambda _: PartitionSpec(), leaf)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def shardings(state: Any) -> Any:
        return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_coded)

    return place_with_auto_axes(init, [params], shardings)


def update_with_auto_axes(
    update: Callable[..., Any], updates: Any, state: Any, params: Any, extra_args: Mapping[str, Any]
) -> Any:
    """`update(updates, state, params, **extra_args)`; results are sharded as the first two are."""
    mesh = explicit_mesh((updates, state))
    if mesh is None:
        return update(updates, state, params, **extra_args)
    leaves, treedef = jax.tree.flatten(extra_args)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]

    def run(updates: Any, state: Any, params: Any, arrays: list[Any]) -> Any:
        given = iter(arrays)
        rest = [next(given) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        return update(updates, state, params, **jax.tree.unflatten(treedef, rest))

    def like(array: Any) -> NamedSharding:
        sharding = jax.typeof(array).sharding
        return NamedSharding(mesh, sharding.spec if sharding.mesh.axis_names else PartitionSpec())

    arrays = [leaf for leaf, a in zip(leaves, is_array, strict=True) if a]
    shardings = jax.tree.map(like, (updates, state))
    try:
        return jax.sharding.auto_axes(run, out_sharding=shardings)(updates, state, params, arrays)
    except ValueError as error:
        if "mesh" in str(error):
            error.add_note(
                "Arrays that a transformation was made with under jax.set_mesh have the mesh in "
                "their types, and so have those that a function among its arguments uses. Give "
                "hyperparameters as numbers or schedules, or by optax.inject_hyperparams inside: "
                "project(optax.inject_hyperparams(optax.adam)(1e-3), map)."
            )
        raise
