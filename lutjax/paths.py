"""Parameter paths: ``layers/0/mlp/up_proj/kernel`` names a leaf of a parameter pytree."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from lutjax.arrays import is_compressed

IsLeaf = Callable[[Any], bool] | None
"""What ``jax.tree.map`` takes as ``is_leaf``."""

_BOX = jax.tree_util.GetAttrKey("value")


def path_string(path: tuple) -> str:
    """The ``/``-joined form of a key path of :mod:`jax.tree_util`.

    A box around an array in a dictionary, such as a variable of Flax NNX, is no part of its name:
    ``nnx.Optimizer`` shows the parameters with it to ``init`` and without it to ``update``.

    >>> path_string(jax.tree_util.tree_leaves_with_path({"a": [1]})[0][0])
    'a/0'
    """
    if len(path) > 1 and path[-1] == _BOX and isinstance(path[-2], jax.tree_util.DictKey):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def boxed(x: Any) -> Any:
    """What is in a box around an array, such as a variable of Flax NNX; None if it is no box."""
    inside = jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda y: y is not x)
    return inside[0][1] if len(inside) == 1 and inside[0][0] == (_BOX,) else None


def path_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The key of one parameter: a function of its path, not of its position in the tree."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def named_leaves(params: Any, is_leaf: IsLeaf = is_compressed) -> list[tuple[str, Any]]:
    """Paths and leaves of a parameter pytree; a compressed array is one leaf.

    >>> named_leaves({"mlp": {"kernel": 1.0}})
    [('mlp/kernel', 1.0)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
    return [(path_string(path), leaf) for path, leaf in leaves]


def map_named(
    function: Callable[..., Any], params: Any, *rest: Any, is_leaf: IsLeaf = is_compressed
) -> Any:
    """``jax.tree.map`` of a function that gets the path first; a compressed array is one leaf.

    >>> map_named(lambda path, leaf: f"{path} is {leaf}", {"mlp": {"kernel": 1.0}})
    {'mlp': {'kernel': 'mlp/kernel is 1.0'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves), params, *rest, is_leaf=is_leaf
    )


def near_misses(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The paths most like a pattern that matched none, for error messages.

    >>> near_misses("mlp/kernal", ["mlp/kernel", "norm/scale"], count=1)
    ['mlp/kernel']
    """
    return difflib.get_close_matches(pattern, list(paths), n=count, cutoff=0.0)
