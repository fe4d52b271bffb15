"""``lift``: run a function of dense parameters on compressed ones."""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import CompressedArray, format_bytes, is_compressed
from lutjax.lift.evaluate import Evaluator
from lutjax.lift.report import LiftReport, MaterializationError, MaterializationWarning, Recorder
from lutjax.lift.values import Weight, logical
from lutjax.paths import path_string


def lift(fn: Callable, *, strict: bool = False) -> Callable:
    """Makes a function of dense arrays run on compressed ones.

    The function is traced with the logical shapes; products, lookups and slices of a compressed
    weight then run on its compressed form with fused kernels, whatever library the function was
    written with. A primitive that needs the dense weight gets it, with a
    :class:`MaterializationWarning` that names the parameter.

    Every call traces ``fn`` anew: put ``jax.jit`` around it, ``jax.jit(lift(fn))``. It composes
    with ``grad``, ``vmap``, ``scan`` and ``shard_map`` on both sides. Python scalars, strings and
    None among the arguments stay as they are; they are not traced.

    Args:
      fn: A function of pytrees of arrays, such as ``model.apply``.
      strict: Raise instead of making any weight dense.

    Returns:
      A function of the same arguments, in which any array may be a compressed one. An argument
      that is returned untouched comes back compressed.

    Raises:
      MaterializationError: If strict and a primitive needs a dense weight; names the primitive and
        the parameter path.
      TypeError: If ``fn`` is no function, or captures a compressed array instead of taking it as an
        argument.

    >>> import jax, jax.numpy as jnp, lutjax
    >>> def layer(params, x):
    ...     return jax.nn.relu(x @ params["kernel"])
    >>> params = lutjax.quantize({"kernel": jnp.eye(64)}, bits=4, group_size=32)
    >>> jax.jit(lutjax.lift(layer))(params, jnp.ones((1, 64))).sum().item()
    64.0
    """
    if not callable(fn):
        raise TypeError(f"{fn!r:.80} is no function; give lift what takes the parameters")

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(strict)
        result = _run(fn, args, kwargs, recorder)
        dense = [use for use in recorder.uses if use.outcome == "materialized"]
        if dense:
            shown = "; ".join(
                f"{use.path} by {use.primitive} ({format_bytes(use.nbytes)})" for use in dense[:3]
            )
            more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
            warnings.warn(
                f"lift made weights dense: {shown}{more}; see lutjax.lift.report(fn, ...)",
                MaterializationWarning,
                stacklevel=2,
            )
        return result

    return lifted


def report(fn: Callable, *args: Any, **kwargs: Any) -> LiftReport:
    """What ``lift(fn)`` would do with each compressed parameter; nothing is computed.

    Args:
      fn: The function to lift.
      *args: Its arguments; arrays may be ``jax.ShapeDtypeStruct``.
      **kwargs: Its keyword arguments.

    Returns:
      A table of uses, fused or materialized, and of the parameters that are not used.

    >>> import jax.numpy as jnp, lutjax
    >>> params = lutjax.quantize({"kernel": jnp.eye(64)}, bits=4, group_size=32)
    >>> print(lutjax.lift.report(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 64))))
    parameter  primitive             outcome
    kernel     dot_general           fused
    1 uses fused, 0 materialized
    """
    recorder = Recorder(strict=False)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [_is_array(leaf) for leaf in leaves]

    def abstract(*arrays: Any) -> Any:
        rest = iter(arrays)
        merged = [next(rest) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        out = _run(fn, args, kwargs, recorder)
        return [leaf for leaf in jax.tree.leaves(out) if _is_array(leaf)]

    jax.eval_shape(abstract, *[leaf for leaf, a in zip(leaves, is_array, strict=True) if a])
    used = {path for use in recorder.uses for path in use.path.split(" + ")}
    given = [path for path, leaf in _named((args, kwargs)) if is_compressed(leaf)]
    return LiftReport(recorder.uses, tuple(path for path in given if path not in used))


lift.report = report  # type: ignore[attr-defined]


_ARRAY = object()
"""Stands for an array among the results of a function."""


def _run(fn: Callable, args: tuple, kwargs: dict, recorder: Recorder) -> Any:
    named = _named((args, kwargs))
    treedef = jax.tree.structure((args, kwargs), is_leaf=is_compressed)
    traced = [is_compressed(leaf) or _is_array(leaf) for _, leaf in named]
    out_leaves: list = []
    out_tree = None

    def flat(*arrays: Any) -> list:
        nonlocal out_leaves, out_tree
        rest = iter(arrays)
        leaves = [next(rest) if t else leaf for t, (_, leaf) in zip(traced, named, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        out_leaves, out_tree = jax.tree.flatten(fn(*args, **kwargs), is_leaf=is_compressed)
        for leaf in out_leaves:
            if is_compressed(leaf):
                raise TypeError(_captured(fn, leaf))
        arrays_out = [leaf for leaf in out_leaves if _is_array(leaf)]
        # Tracers must not be held when the trace has ended.
        out_leaves = [_ARRAY if _is_array(leaf) else leaf for leaf in out_leaves]
        return arrays_out

    values = [
        Weight(leaf, path) if is_compressed(leaf) else _canonical(leaf)
        for t, (path, leaf) in zip(traced, named, strict=True)
        if t
    ]
    try:
        closed = jax.make_jaxpr(flat)(*map(logical, values))
    except (TypeError, AttributeError) as error:
        kind = next((c for c in _kinds(CompressedArray) if c.__name__ in str(error)), None)
        if kind is None or isinstance(error, MaterializationError):
            raise
        raise TypeError(_captured(fn, kind.__name__)) from error
    outputs = Evaluator(recorder)(closed.jaxpr, closed.consts, values)
    assert out_tree is not None
    rest = iter([y.array if isinstance(y, Weight) else y for y in outputs])
    return out_tree.unflatten([next(rest) if leaf is _ARRAY else leaf for leaf in out_leaves])


def _captured(fn: Callable, what: Any) -> str:
    return (
        f"{getattr(fn, '__name__', fn)} uses a compressed array ({what}) that is not one of its "
        f"arguments, or passes it to a function that needs a plain array; pass it as an argument: "
        f"lift(fn)(params, ...)"
    )


def _kinds(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [kind for child in children for kind in (child, *_kinds(child))]


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths among the arguments: ``layers/0/kernel`` of whichever argument.

    Where two arguments have a path in common, it starts with the argument's place or name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
    paths = [path_string(path[2:]) or path_string(path[1:]) for path, _ in leaves]
    count = collections.Counter(paths)
    return [
        (path_string(key[1:]) if count[path] > 1 else path, leaf)
        for path, (key, leaf) in zip(paths, leaves, strict=True)
    ]


def _canonical(leaf: Any) -> Any:
    """NumPy arrays in the dtype that JAX traces them with: float64 is float32 without x64."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def _is_array(leaf: Any) -> bool:
    """Whether it is traced; classes such as ``np.float32`` have these attributes, too."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)
