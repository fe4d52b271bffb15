"""Adapters on the weights of a model: one-sided, two-sided (LoRA) and Kronecker (KronA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from lutjax.adapters.array import AdapterArray, is_adapter
from lutjax.arrays import is_compressed
from lutjax.dtypes import at_least_float32
from lutjax.linear_maps import BoundMap, Gaussian, KronA, LinearMap, Projection, Reshaped
from lutjax.linear_maps.composed import KronAMap
from lutjax.linear_maps.dimension_numbers import (
    WeightDimensionNumbers,
    resolve_dimension_numbers,
)
from lutjax.paths import path_key, path_string


def one_sided(
    params: Any,
    map: LinearMap,
    key: PRNGKeyArray,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    dtype: Any = None,
) -> Any:
    """Adapters `W_0 + S^T lambda` with `S` frozen and `lambda = 0` on the chosen weights.

    For a one-sided map this is one-sided LoRA, `W_0 + P lambda`; any linear map will do. See
    :func:`lutjax.adapters.dual` for the optimiser that it is the dual of.

    Args:
      params: A tree of dense or compressed weights.
      map: The rule for `S`; one that depends on gradients starts as a truncated identity.
      key: Where maps are drawn from.
      weight_dimension_numbers: Which weights get an adapter; see
        :func:`lutjax.linear_maps.resolve_dimension_numbers`.
      dtype: That of the map and of `lambda`; by default that of the weight, but float32 for
        narrower ones, in which small updates would be lost.

    Returns:
      `params` with an :class:`AdapterArray` in the place of each chosen weight.

    Raises:
      ValueError: When the map does not fit a weight, naming it.

    Source: Duality (arXiv 2502.13811, section 3).

    >>> import jax.numpy as jnp
    >>> import lutjax
    >>> params = {"w": jnp.ones((4, 6))}
    >>> adapted = one_sided(params, Gaussian(2), jax.random.key(0))
    >>> lutjax.lift(lambda p, x: x @ p["w"])(adapted, jnp.ones((1, 4))).shape
    (1, 6)
    """
    return _adapt(params, map, key, weight_dimension_numbers, lambda bound: bound, False, dtype)


def two_sided(
    params: Any,
    rank: int,
    key: PRNGKeyArray,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    dtype: Any = None,
) -> Any:
    """LoRA: `W_0 + A B` with both factors trained, `A ~ N(0, 1/r)` of `[K, r]` and `B = 0`.

    Not the dual of any gradient transformation: the map itself moves.

    Args:
      params: As for :func:`one_sided`.
      rank: `r`.
      key: Where `A` is drawn from.
      weight_dimension_numbers: As for :func:`one_sided`.
      dtype: Of both factors; None: that of the weight, or float32 if it is narrower, where small
        updates would be lost.

    Source: LoRA (arXiv 2106.09685).

    >>> import jax.numpy as jnp
    >>> adapted = two_sided({"w": jnp.ones((4, 6))}, 2, jax.random.key(0))
    >>> jax.tree.map(jnp.shape, trainable(adapted))
    {'w': {'factor': (4, 2), 'latent': (2, 6)}}
    """

    def store_factor(bound: BoundMap) -> BoundMap:
        if isinstance(bound, Reshaped):
            return dataclasses.replace(bound, inner=store_factor(bound.inner))
        return Projection(bound.basis, "left")  # type: ignore[attr-defined]

    map_ = Gaussian(rank, side="left")
    return _adapt(params, map_, key, weight_dimension_numbers, store_factor, True, dtype)


def kronecker(
    params: Any,
    factor: tuple[int, int],
    key: PRNGKeyArray,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    dtype: Any = None,
) -> Any:
    """KronA: `W_0 + A (x) B` with both factors trained, `A` random of shape `factor` and `B = 0`.

    Args:
      params: As for :func:`one_sided`.
      factor: Shape of `A`; it divides the matrix.
      key: Where `A` is drawn from.
      weight_dimension_numbers: As for :func:`one_sided`.
      dtype: As for :func:`two_sided`.

    Source: KronA (arXiv 2212.10650).

    >>> import jax.numpy as jnp
    >>> adapted = kronecker({"w": jnp.ones((4, 6))}, (2, 3), jax.random.key(0))
    >>> jax.tree.map(jnp.shape, trainable(adapted))
    {'w': {'factor': (2, 3), 'latent': (2, 2)}}
    """
    return _adapt(
        params, KronA(factor), key, weight_dimension_numbers, lambda bound: bound, True, dtype
    )


def _adapt(
    params: Any,
    map_: LinearMap,
    key: PRNGKeyArray,
    weight_dimension_numbers: WeightDimensionNumbers,
    finish: Callable[[BoundMap], BoundMap],
    train_factor: bool,
    dtype: Any = None,
) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    arrays = [leaf if hasattr(leaf, "shape") else np.asarray(leaf) for _, leaf in leaves]
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    numbers = resolve_dimension_numbers(
        jax.tree.unflatten(treedef, shapes), weight_dimension_numbers
    )
    adapted = []
    for path, leaf in leaves:
        name = path_string(path)
        if name in numbers:
            leaf_key = path_key(key, name)
            try:
                own = at_least_float32(leaf.dtype) if dtype is None else dtype
                bound = map_.init(leaf_key, leaf.shape, dtype=own, dimension_numbers=numbers[name])
                if map_.depends_on == "weight":
                    dense = leaf.materialize() if is_compressed(leaf) else leaf
                    bound = map_.refresh(bound, leaf_key, weight=dense)
                leaf = AdapterArray.of(leaf, finish(bound), train_factor=train_factor, dtype=own)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        adapted.append(leaf)
    return jax.tree.unflatten(treedef, adapted)


def _factor(bound: BoundMap) -> jax.Array:
    if isinstance(bound, Projection):
        return bound.basis
    if isinstance(bound, KronAMap):
        return bound.factor
    raise TypeError(f"{type(bound).__name__} has no stored factor that could be trained")


def _with_factor(bound: BoundMap, factor: jax.Array) -> BoundMap:
    name = "basis" if isinstance(bound, Projection) else "factor"
    return dataclasses.replace(bound, **{name: factor})  # type: ignore[type-var]


def trainable(adapted: Any, *, others: bool = False) -> Any:
    """What is trained of a tree with adapters, as a tree for an optimiser.

    Args:
      adapted: What :func:`one_sided`, :func:`two_sided` or :func:`kronecker` returned.
      others: Whether dense leaves without an adapter are trained as well.

    Returns:
      For each adapter its latent, or ``{"factor": ..., "latent": ...}`` if both are trained; other
      leaves, or None in their place.

    Raises:
      ValueError: If nothing would be trained.
    """
    if not others and not any(map(is_adapter, jax.tree.leaves(adapted, is_leaf=is_compressed))):
        raise ValueError(
            "there is no adapter to train; those of lora.attach are trained as the argument that "
            "they are, or by lutjax.partition"
        )

    def pick(leaf: Any) -> Any:
        if is_adapter(leaf):
            if leaf.train_factor:
                return {"factor": _factor(leaf.map), "latent": leaf.latent}
            return leaf.latent
        return leaf if others and not is_compressed(leaf) else None

    return jax.tree.map(pick, adapted, is_leaf=is_compressed)


def with_trainable(adapted: Any, values: Any) -> Any:
    """`adapted` with the values of :func:`trainable` put back.

    >>> import jax.numpy as jnp
    >>> adapted = two_sided({"w": jnp.ones((4, 6))}, 2, jax.random.key(0))
    >>> zero = jax.tree.map(jnp.zeros_like, trainable(adapted))
    >>> float(with_trainable(adapted, zero)["w"].map.basis.sum())
    0.0
    """

    def put(leaf: Any, value: Any) -> Any:
        if value is None:
            return leaf
        if not is_adapter(leaf):
            return value
        if leaf.train_factor:
            bound = _with_factor(leaf.map, value["factor"])
            return dataclasses.replace(leaf, map=bound, latent=value["latent"])
        return dataclasses.replace(leaf, latent=value)

    return jax.tree.map(put, adapted, values, is_leaf=is_compressed)
