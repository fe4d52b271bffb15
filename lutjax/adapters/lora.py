"""Low-rank adapters as a tree of their own: put on, taken off, merged, stacked and quantised.

An adapter maps parameter paths to :class:`LowRankArray`; on a model, each stands in a
:class:`SumArray` beside the base weight. The base is shared, never copied, so that switching
adapters is free.

>>> from lutjax.adapters import lora
>>> params = {"mlp": {"kernel": jnp.ones((4, 6))}}
>>> adapter = lora.init(params, rank=2, key=jax.random.key(0))
>>> adapted = lora.attach(params, adapter)
>>> adapted["mlp"]["kernel"]
SumArray(DenseArray(shape=(4, 6), float32, 96 B), LowRankArray(shape=(4, 6), float32, rank=2, 80 B))
>>> base, same = lora.detach(adapted)
>>> base["mlp"]["kernel"] is params["mlp"]["kernel"]
True
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lutjax.adapters.array import AdapterArray, is_adapter
from lutjax.arrays import (
    CompressedArray,
    DenseArray,
    LowRankArray,
    ProductArray,
    SumArray,
    is_compressed,
)
from lutjax.paths import map_named, named_leaves, near_misses, path_key
from lutjax.transforms import LutConfig, Rule, quantize_array
from lutjax.transforms.decompose import check_rank
from lutjax.transforms.quantize import weight_view
from lutjax.transforms.recipe import COLUMN, DENSE, MIN_GROUP_SIZE

ALL_LINEAR = ("*kernel",)
"""Every kernel but that of the output head and those of routers."""


def init(
    params: Any,
    rank: int,
    key: PRNGKeyArray,
    *,
    targets: Sequence[str] = ALL_LINEAR,
    dtype: Any = jnp.float32,
) -> dict[str, LowRankArray]:
    """A new adapter that changes nothing yet: ``left ~ N(0, 1 / K)`` and ``right = 0``.

    Args:
      params: Dense or compressed parameters.
      rank: Inner size r, 1 to min(K, N).
      key: Each matrix uses its own key, made from this one and its path.
      targets: Paths or globs of the matrices to adapt; what recipes leave dense (embeddings,
        routers, the output head, norms) only if it is named in full.
      dtype: Dtype of the factors.

    Returns:
      The adapter, by path.

    Raises:
      ValueError: If a target matches nothing, or the rank does not fit a matrix.

    Source: LoRA (arXiv 2106.09685).
    """
    leaves = named_leaves(params)
    adapter = {}
    for path, leaf in leaves:
        if not _is_target(path, leaf, targets):
            continue
        if isinstance(leaf, CompressedArray):
            view, batch, (k, n) = leaf.view, leaf.batch_shape, leaf.matrix_shape
        else:
            count, view = weight_view(leaf.shape, Rule(path, None), path)
            batch, (k, n) = leaf.shape[:count], view.matrix_shape(leaf.shape[count:])
        check_rank(rank, k, n, path)
        left = jax.random.normal(path_key(key, path), (*batch, k, rank), dtype) / jnp.asarray(
            k**0.5, dtype
        )
        adapter[path] = LowRankArray.of(left, jnp.zeros((*batch, rank, n), dtype), view)
    for pattern in targets:
        if not any(_is_target(path, leaf, (pattern,)) for path, leaf in leaves):
            near = near_misses(pattern, [path for path, _ in leaves])
            raise ValueError(f"no matrix matches {pattern!r}; the nearest paths are {near}")
    return adapter


def attach(params: Any, adapter: Mapping[str, CompressedArray]) -> Any:
    """The parameters with an adapter on them; several can be put on, one after the other.

    Args:
      params: Dense or compressed parameters.
      adapter: What to add to which path.

    Returns:
      A tree like ``params`` with a :class:`SumArray` at each path of the adapter.

    Raises:
      ValueError: If a path does not exist or a shape does not fit; names the path.
    """
    paths = [path for path, _ in named_leaves(params)]
    for path in adapter:
        if path not in paths:
            raise ValueError(
                f"the adapter has {path!r}, which the parameters do not; the nearest paths are "
                f"{near_misses(path, paths)}"
            )

    def add(path: str, leaf: Any) -> Any:
        if path not in adapter:
            return leaf
        part = adapter[path]
        if leaf.shape != part.shape:
            raise ValueError(f"{path!r} has shape {leaf.shape}, but its adapter has {part.shape}")
        if not is_compressed(leaf):
            leaf = DenseArray.of(leaf, len(part.batch_shape), part.view)
        return SumArray.of(leaf, part)

    return map_named(add, params)


def detach(params: Any) -> tuple[Any, dict[str, LowRankArray]]:
    """The inverse of :func:`attach`: the base, and one adapter with all that was put on.

    The low-rank part of a decomposition counts as an adapter, too, and so does what
    :func:`lutjax.adapters.two_sided` and one-sided maps have put on.

    Raises:
      TypeError: If a quantised adapter is on, which is for inference, or a
        :class:`lutjax.adapters.AdapterArray` of another map.
    """
    adapter: dict[str, LowRankArray] = {}

    def take(path: str, leaf: Any) -> Any:
        if isinstance(leaf, AdapterArray):
            found = leaf.low_rank()
            if found is None:
                message = f"{path!r} has an adapter that is no low-rank part; merge it: {leaf}"
                raise TypeError(message)
            adapter[path] = found
            return leaf.base.materialize() if isinstance(leaf.base, DenseArray) else leaf.base
        if not isinstance(leaf, SumArray):
            return leaf
        if any(isinstance(part, ProductArray) for part in leaf.parts):
            raise TypeError(f"{path!r} has a quantised adapter, which cannot be trained: {leaf}")
        low_rank = [part for part in leaf.parts if isinstance(part, LowRankArray)]
        rest = [part for part in leaf.parts if not isinstance(part, LowRankArray)]
        if not low_rank or not rest:
            return leaf
        adapter[path] = _concatenate(low_rank)
        if len(rest) > 1:
            return SumArray(tuple(rest))
        return rest[0].materialize() if isinstance(rest[0], DenseArray) else rest[0]

    base = map_named(take, params)
    return base, adapter


def merge(params: Any) -> Any:
    """Dense weights in the place of adapted ones, of every kind; other leaves as they are.

    As in :func:`detach`, the low-rank part of a decomposition counts as an adapter, too: training
    may have changed it. Merge before decomposing other weights, or merge a subtree, to keep them.

    >>> from lutjax.adapters import two_sided
    >>> adapted = two_sided({"w": jnp.ones((4, 6))}, 2, jax.random.key(0))
    >>> bool((merge(adapted)["w"] == 1).all())
    True
    """

    def add(leaf: Any) -> Any:
        adapted = isinstance(leaf, SumArray) and any(
            isinstance(part, LowRankArray | ProductArray) for part in leaf.parts
        )
        return leaf.materialize() if adapted or is_adapter(leaf) else leaf

    return jax.tree.map(add, params, is_leaf=is_compressed)


def unmerge(params: Any, adapter: Mapping[str, CompressedArray]) -> Any:
    """Dense weights without an adapter that was merged into them, up to rounding.

    Raises:
      ValueError: If a path of the adapter does not exist, or is not dense; names the path.
    """
    leaves = dict(named_leaves(params))
    for path in adapter:
        if path not in leaves or is_compressed(leaves[path]):
            found = f"is {leaves[path]!r}" if path in leaves else "does not exist"
            raise ValueError(f"cannot unmerge {path!r}: it {found}, not a dense weight")

    def subtract(path: str, leaf: Any) -> Any:
        part = adapter.get(path)
        if part is None:
            return leaf
        change = part.astype(jnp.float32).materialize()
        return (leaf.astype(jnp.float32) - change).astype(leaf.dtype)

    return map_named(subtract, params)


def stack(
    *adapters: Mapping[str, LowRankArray], weights: Sequence[float] | None = None
) -> dict[str, LowRankArray]:
    """One adapter that does what the weighted sum of several does; the ranks add up.

    Args:
      *adapters: May have different paths and ranks.
      weights: A factor for each; 1 by default.

    >>> one = {"w": LowRankArray.of(jnp.ones((2, 1)), jnp.ones((1, 2)))}
    >>> stack(one, one, weights=(1, -1))["w"].materialize().tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters, but {len(weights)} weights; give one for each")
    parts: dict[str, list[LowRankArray]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, part in adapter.items():
            factor = jnp.asarray(weight, part.right.dtype)
            scaled = dataclasses.replace(part, right=part.right * factor)
            parts.setdefault(path, []).append(scaled)
    return {path: _concatenate(found) for path, found in parts.items()}


def difference(
    trained: Mapping[str, LowRankArray], initial: Mapping[str, LowRankArray]
) -> dict[str, LowRankArray]:
    r"""What training changed, as an adapter of twice the rank for the *original* weights.

    .. math:: W_0 + (L_1 L_2 - L_1^0 L_2^0)
              = (Q + L_1 L_2) + (W_0 - Q - L_1^0 L_2^0)

    So the original model with it is the trained one plus the error of the decomposition, which the
    original model does not have.

    Raises:
      ValueError: If the adapters are not of the same paths.
    """
    if set(trained) != set(initial):
        raise ValueError(
            f"the adapters differ in {sorted(set(trained) ^ set(initial))[:3]}; give the adapter "
            "before and after training of one model"
        )
    return stack(trained, initial, weights=(1, -1))


def quantize_adapter(
    adapter: Mapping[str, LowRankArray], *, bits: int = 8, group_size: int = 64
) -> dict[str, ProductArray]:
    """An adapter for inference whose factors are lookup-table codes (8-bit integers by default).

    Groups run along the rows of each factor; a factor with fewer rows than a group has one scale
    for each column.

    >>> adapter = init({"kernel": jnp.ones((1024, 1024))}, rank=8, key=jax.random.key(0))
    >>> adapter["kernel"].nbytes, quantize_adapter(adapter)["kernel"].nbytes
    (65536, 20736)
    """

    def convert(path: str, factor: jax.Array) -> CompressedArray:
        rows = factor.shape[-2]
        group = group_size if rows >= max(group_size, MIN_GROUP_SIZE) else COLUMN
        rule = Rule("*", LutConfig(bits, group), axis=-2)  # type: ignore[arg-type]
        return quantize_array(factor, rule, path=path)

    return {
        path: ProductArray.of(
            convert(f"{path} (left)", part.left).astype(part.dtype),
            convert(f"{path} (right)", part.right),
            part.view,
        )
        for path, part in adapter.items()
    }


def _concatenate(parts: Sequence[LowRankArray]) -> LowRankArray:
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        left=jnp.concatenate([part.left for part in parts], axis=-1),
        right=jnp.concatenate([part.right for part in parts], axis=-2),
    )


def _is_target(path: str, leaf: Any, targets: Sequence[str]) -> bool:
    if path in targets:
        return True
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or len(leaf.shape) < 2:
        return False
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in DENSE):
        return False
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in targets)
