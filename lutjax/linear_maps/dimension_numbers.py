"""Which axes of a weight make its matrix: n-dimensional weights seen as `[*batch, m, n]`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lutjax.arrays import MatrixView
from lutjax.paths import path_string


class DimensionNumbers(NamedTuple):
    """The axes of a weight that are contracted with the input, and those that index its output.

    Axes named by neither are batch axes, which come first: every index of them is a matrix of its
    own. The field names are those of ``optax.contrib.GaLoreDimensionNumbers``, which is accepted
    wherever this is.

    Attributes:
      reduction_axis: Axis or axes of the input dimension `m`.
      output_axis: Axis or axes of the output dimension `n`.
    """

    reduction_axis: int | Sequence[int] = -2
    output_axis: int | Sequence[int] = -1


WeightDimensionNumbers = Any
"""``None``, ``DimensionNumbers``, a tree of either (``None``: leave alone), ``params -> tree``."""


def _axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for a weight with {ndim} dimensions")
    return tuple(a % ndim for a in axes)


def _split_axes(
    ndim: int, numbers: DimensionNumbers
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    reduction, output = (_axes(numbers[i], ndim) for i in (0, 1))
    named = reduction + output
    if not reduction or not output or len(set(named)) != len(named):
        raise ValueError(
            f"reduction_axis={numbers[0]} and output_axis={numbers[1]} must be non-empty and "
            f"disjoint for a weight with {ndim} dimensions"
        )
    batch = tuple(a for a in range(ndim) if a not in named)
    return batch, reduction, output


def matrix_view(shape: Sequence[int], numbers: DimensionNumbers) -> tuple[int, MatrixView]:
    """How a weight of `shape` is `[*batch, m, n]`: the number of batch axes, and the view.

    Raises:
      ValueError: When the numbers don't fit the shape, or batch axes do not come first.

    >>> count, view = matrix_view((2, 3, 4, 5), DimensionNumbers(1, (2, 3)))
    >>> count, view.matrix_shape((3, 4, 5))
    (1, (3, 20))
    """
    batch, reduction, output = _split_axes(len(shape), numbers)
    count = len(batch)
    if batch != tuple(range(count)):
        raise ValueError(
            f"{numbers} leaves the batch axes {batch} of shape {shape}; batch axes must come first"
        )
    inner = [[a - count for a in axes] for axes in (reduction, output)]
    return count, MatrixView.of(shape[count:], *inner)


def _is_numbers(x: Any) -> bool:
    return x is None or (isinstance(x, tuple) and hasattr(x, "reduction_axis"))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def matching(*patterns: str, numbers: DimensionNumbers | None = None) -> Callable[[Any], Any]:
    """Dimension numbers for the weights whose path matches one of the patterns, and no others.

    Args:
      *patterns: Shell patterns over the ``/``-joined path, e.g. ``"*/mlp/*/kernel"``.
      numbers: What a matching leaf gets; the last two axes by default.

    Returns:
      A function of the parameters, to be passed as ``weight_dimension_numbers``.

    Raises:
      ValueError: When a pattern matches none of the parameters that it is called on, or these are
        one number.

    >>> params = {"mlp": {"w": jnp.ones((2, 2))}, "head": jnp.ones((2, 2))}
    >>> jax.tree.leaves(matching("mlp/*")(params))
    [-2, -1]
    """
    found = DimensionNumbers() if numbers is None else numbers

    def resolve(params: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_masked)
        paths = [path_string(path) for path, _ in leaves]
        if paths == [""] and jnp.ndim(leaves[0][1]) == 0:  # such as a step
            raise ValueError(
                f"matching({', '.join(map(repr, patterns))}) was called on a number, not on "
                f"parameters; in optax.inject_hyperparams name weight_dimension_numbers in "
                f"static_args"
            )
        hits = set()
        for pattern in patterns:
            matched = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
            if paths and not matched:
                raise ValueError(f"no parameter matches {pattern!r}; the paths are {paths}")
            hits.update(matched)
        return jax.tree.unflatten(treedef, [found if path in hits else None for path in paths])

    return resolve


def resolve_dimension_numbers(
    params: Any, weight_dimension_numbers: WeightDimensionNumbers
) -> dict[str, DimensionNumbers]:
    """The matrices among the leaves of `params`: path -> dimension numbers.

    Args:
      params: A tree of arrays (or of shapes).
      weight_dimension_numbers: ``None`` takes every floating leaf with at least two axes, its last
        two axes being the matrix and the others batch axes. A single ``DimensionNumbers`` does the
        same with other axes. Both take stacked vectors for a matrix, such as the norms `[L, d]` of
        a decoder with stacked layers; use :func:`matching` to name the matrices there. A tree (or a
        function of `params` that returns one) names each leaf;
        ``None`` in it, or no entry, leaves the leaf alone.

    Raises:
      TypeError: For a tree of booleans, or a name.
      ValueError: When the numbers don't fit their leaf, or name a leaf that does not exist.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_masked)
    by_path = {path_string(path): leaf for path, leaf in leaves}
    asked = weight_dimension_numbers
    if callable(asked) and jax.tree_util.all_leaves([asked]):  # and no callable module of numbers
        asked = asked(params)
    numbers: dict[str, DimensionNumbers]
    if _is_numbers(asked):
        every = DimensionNumbers() if asked is None else DimensionNumbers(*asked)
        numbers = {
            path: every
            for path, leaf in by_path.items()
            if not _is_masked(leaf)
            and jnp.ndim(leaf) >= 2
            and jnp.issubdtype(leaf.dtype, jnp.floating)
        }
    else:
        named, _ = jax.tree_util.tree_flatten_with_path(
            asked, is_leaf=lambda x: _is_numbers(x) or _is_masked(x)
        )
        for keys, n in named:
            if isinstance(n, bool | str):
                raise TypeError(
                    f"weight_dimension_numbers has {n!r} for {path_string(keys)!r}; use "
                    "DimensionNumbers() for a weight that is meant and None for another, or "
                    "matching(...) for globs of paths"
                )
        numbers = {
            path_string(path): DimensionNumbers(*n)
            for path, n in named
            if n is not None and not _is_masked(n)
        }
    for path in numbers:
        if path not in by_path:
            raise ValueError(
                f"weight_dimension_numbers names {path!r}, which is not a parameter; "
                f"the parameters are {list(by_path)}"
            )
    numbers = {path: n for path, n in numbers.items() if not _is_masked(by_path[path])}
    for path, n in numbers.items():
        shape = jnp.shape(by_path[path])
        try:
            _split_axes(len(shape), n)
        except ValueError as error:
            raise ValueError(f"{n} does not fit {path!r} of shape {shape}: {error}") from None
    return numbers
