"""Which arrays of compressed parameters learn, and which stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lutjax.arrays import CompressedArray, is_compressed
from lutjax.paths import path_string


def partition(params: Any, trainable: Callable[[str, Any], bool] | None = None) -> tuple[Any, Any]:
    """Splits parameters into arrays that learn and arrays that do not.

    Both halves have the structure of ``params`` with None where an array is in the other half, so
    ``jax.grad``, optax and Flax's ``TrainState`` work on the first as on any parameters, and what
    is frozen takes neither gradients nor optimiser state. Pass both to jitted functions as
    arguments, and join them inside with :func:`combine`.

    Args:
      params: A pytree of parameters, dense or compressed.
      trainable: Whether an array learns, given its path and itself; the parts of a compressed
        weight have paths too, such as ``layers/0/q_proj/kernel/parts/1/left``. By default all dense
        floating-point parameters and low-rank factors learn; codes, scales and tables do not, nor
        do the adapters of :func:`lutjax.adapters.one_sided` and its like, which have a
        :func:`lutjax.adapters.trainable` of their own.

    Returns:
      ``(trainable, frozen)``.

    Raises:
      TypeError: If ``trainable`` picks an array that is not floating point.

    >>> import jax, jax.numpy as jnp, lutjax
    >>> base = lutjax.quantize(jnp.eye(64), bits=4)
    >>> adapter = lutjax.LowRankArray.of(jnp.ones((64, 2)), jnp.zeros((2, 64)))
    >>> params = {"kernel": lutjax.SumArray.of(base, adapter)}
    >>> learns, frozen = partition(params)
    >>> [leaf.shape for leaf in jax.tree.leaves(learns)]
    [(64, 2), (2, 64)]
    >>> def loss(learns, x):
    ...     return lutjax.lift(lambda p, x: (x @ p["kernel"]).sum())(combine(learns, frozen), x)
    >>> jax.grad(loss)(learns, jnp.ones((1, 64)))["kernel"].parts[1].right.shape
    (2, 64)
    """
    owners = _owners(params)

    def learns(key: tuple, leaf: Any) -> bool:
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if trainable is None:
            owner = owners[key]
            return floating and (owner is None or owner.trains)
        chosen = bool(trainable(path_string(key), leaf))
        if chosen and not floating:
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{path_string(key)!r} cannot be trained: it is {kind}, not floating point; let "
                f"trainable(path, array) return False for it"
            )
        return chosen

    leaves = jax.tree_util.tree_leaves_with_path(params)
    treedef = jax.tree.structure(params)
    chosen = [learns(key, leaf) for key, leaf in leaves]

    def half(wanted: bool) -> Any:
        kept = [leaf if c == wanted else None for c, (_, leaf) in zip(chosen, leaves, strict=True)]
        return jax.tree.unflatten(treedef, kept)

    return half(True), half(False)


def combine(trainable: Any, frozen: Any) -> Any:
    """Joins the halves that :func:`partition` made.

    Args:
      trainable: The first half, possibly after an update.
      frozen: The second half.

    Returns:
      The parameters.

    >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def _owners(params: Any) -> dict[tuple, CompressedArray | None]:
    """For the key path of every array, the innermost compressed weight that it is part of."""
    owners: dict[tuple, CompressedArray | None] = {}

    def visit(prefix: tuple, tree: Any) -> None:
        inside = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: is_compressed(x) and x is not tree
        )
        for key, node in inside:
            if is_compressed(node):
                visit((*prefix, *key), node)
            else:
                owners[(*prefix, *key)] = tree if is_compressed(tree) else None

    visit((), params)
    return owners
