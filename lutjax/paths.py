"""Parameter paths: ``layers/0/mlp/up_proj/kernel`` names a leaf of a parameter pytree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax

from lutjax.arrays import is_compressed


def path_string(path: tuple) -> str:
    """The ``/``-joined form of a key path of :mod:`jax.tree_util`.

    >>> path_string(jax.tree_util.tree_leaves_with_path({"a": [1]})[0][0])
    'a/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(params: Any) -> list[tuple[str, Any]]:
    """Paths and leaves of a parameter pytree; a compressed array is one leaf.

    >>> named_leaves({"mlp": {"kernel": 1.0}})
    [('mlp/kernel', 1.0)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_compressed)
    return [(path_string(path), leaf) for path, leaf in leaves]


def near_misses(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The paths most like a pattern that matched none, for error messages.

    >>> near_misses("mlp/kernal", ["mlp/kernel", "norm/scale"], count=1)
    ['mlp/kernel']
    """
    return difflib.get_close_matches(pattern, list(paths), n=count, cutoff=0.0)
