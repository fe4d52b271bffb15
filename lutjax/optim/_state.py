"""Moments inside the state of an arbitrary optimiser: which leaves they are, and carrying them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import optax

from lutjax.arrays import LutArray
from lutjax.paths import path_string

_KeyPath = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CodedMoment(LutArray):
    """A moment in codes, which stands in a state where the array stood.

    States also have the containers of the parameters, such as adapters: compressed arrays that have
    moments inside, and are none.
    """


def is_coded(x: Any) -> bool:
    """Whether `x` is a coded moment, which is one leaf of a state."""
    return isinstance(x, CodedMoment)


_FIRST_MOMENTS = dict.fromkeys(("mu", "trace", "ema"), 1)
_SECOND_MOMENTS = dict.fromkeys(
    ("nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col", "exp_avg_sq", "e_g", "e_x"), 2
)
_ORDERS = _FIRST_MOMENTS | _SECOND_MOMENTS
"""State fields of optax that are linear in the gradients, and those that are sums of squares."""

_ORDERS_BESIDE_N = {"m": 1, "v": 1, "g": 1, "n": 2}
"""Those of states whose fields include `m` and `n`, like Adan's, of which `v` has signs."""

_ORDERS_OF_SM3 = {"mu": 2, "nu": 1}

_ACCUMULATORS = frozenset({"acc_grads", "grad_acc"})
"""State fields in which gradients are collected until a step is taken."""

_ITERATES = frozenset({"z", "x0", "params", "params0", "init_params", "init_particles"})
"""State fields that are copies of parameters, of now or of the start."""


def _key_paths(tree: Any) -> list[_KeyPath]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_coded)]


def leaf_paths(tree: Any) -> dict[_KeyPath, str]:
    """The paths of the leaves of a tree, such as parameters or their gradients, by their keys."""
    return {key_path: path_string(key_path) for key_path in _key_paths(tree)}


def _name(key: Any) -> str | None:
    """The name, if a key of a path is a field of a named tuple or dataclass."""
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else None


def _own_keys(key_path: _KeyPath, parameters: Collection[_KeyPath]) -> _KeyPath:
    """The keys of a leaf of a state before those of its parameter; all where it has none."""
    starts = (i for i in range(len(key_path) + 1) if key_path[i:] in parameters)
    return key_path[: next(starts, len(key_path))]


def needs_precision(state: Any, parameters: Mapping[_KeyPath, str]) -> list[bool]:
    """For each leaf of a state whether it must stay as it is.

    Small changes add up in copies of parameters and in sums. A variance that is the difference of
    two moments (centred RMSProp) would be negative if they were rounded apart.

    Args:
      state: The state of any optax transformation; a coded moment is one leaf.
      parameters: From :func:`leaf_paths`.
    """
    exact = _ITERATES | _ACCUMULATORS
    return [
        centred or any(_name(key) in exact for key in _own_keys(key_path, parameters))
        for key_path, centred in zip(_key_paths(state), _is_centred(state), strict=True)
    ]


def _is_centred(state: Any) -> list[bool]:
    """For each leaf whether its state subtracts the square of one moment from the other."""

    def stops(x: Any) -> bool:
        return isinstance(x, optax.ScaleByRStdDevState) or is_coded(x)

    found: list[bool] = []
    for node in jax.tree.leaves(state, is_leaf=stops):
        leaves = jax.tree.leaves(node, is_leaf=is_coded)
        found += [isinstance(node, optax.ScaleByRStdDevState)] * len(leaves)
    return found


def find_moments(
    state: Any, parameters: Mapping[_KeyPath, str]
) -> list[tuple[Literal[1, 2], str | None] | None]:
    """For each leaf of a state its order and the path of its parameter, None if no moment.

    The outermost field decides. Those within the path of a parameter are its own names; where there
    is none, as in a state of flattened parameters, the path is None.

    Args:
      state: The state of any optax transformation; a coded moment is one leaf.
      parameters: From :func:`leaf_paths`.

    >>> import optax
    >>> params = {"v": 1.0}
    >>> find_moments(optax.adam(1.0).init(params), leaf_paths(params))  # count, mu, nu
    [None, (1, 'v'), (2, 'v')]
    """
    key_paths = _key_paths(state)
    fields: dict[_KeyPath, set[str | None]] = {}
    for key_path in key_paths:
        for i, key in enumerate(key_path):
            fields.setdefault(key_path[:i], set()).add(_name(key))
    # SM3 has accumulators for each axis of a parameter in ``mu``, and momentum in ``nu``.
    by_axis = {
        key_path[:i]
        for key_path in key_paths
        for i, key in enumerate(key_path[:-1])
        if _name(key) == "mu" and key_path[i + 1 : -1] in parameters
    }

    def moment(key_path: _KeyPath) -> Any:
        own = _own_keys(key_path, parameters)
        for i, key in enumerate(own):
            holder = key_path[:i]
            orders = _ORDERS
            if holder in by_axis:
                orders = _ORDERS_OF_SM3
            elif {"m", "n"} <= fields[holder]:
                orders = _ORDERS_BESIDE_N
            if (order := orders.get(_name(key) or "")) is not None:
                return order, parameters.get(key_path[len(own) :])
        return None

    return [moment(key_path) for key_path in key_paths]


def map_moments(
    function: Callable[[str, Literal[1, 2], Any], Any],
    state: Any,
    parameters: Mapping[_KeyPath, str],
) -> tuple[Any, int]:
    """Applies `function(path, order, moment)` to the moments of parameters.

    Args:
      function: Gets the parameter's path, 1 or 2 for the order of the moment, and the moment.
      state: The state of any optax transformation.
      parameters: Those whose moments are meant, from :func:`leaf_paths`.

    Returns:
      The new state and the number of first moments that were found.
    """
    found = 0
    leaves, treedef = jax.tree.flatten(state, is_coded)
    for i, moment in enumerate(find_moments(state, parameters)):
        order, path = moment or (None, None)
        if order is not None and path is not None:
            leaves[i] = function(path, order, leaves[i])
            found += order == 1
    return jax.tree.unflatten(treedef, leaves), found


def restart(fresh: Any, state: Any, params: Any) -> Any:
    """`state`, with what it remembers of past gradients taken from `fresh`.

    That is what it keeps for each parameter, and the numbers beside it in the same named tuple,
    such as the steps that bias correction counts. All else goes on: schedules, hyperparameters,
    keys, and the accumulation of gradients, which is at its beginning at a reset.

    Args:
      fresh: The state as it is made for `params`.
      state: Of the same structure; the dtypes are kept.
      params: The parameters.
    """
    parameters = set(_key_paths(params))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_coded)
    owners = {
        key_path[:i]
        for key_path, leaf in leaves
        for i, key in enumerate(key_path)
        if key_path[i + 1 :] in parameters and leaf.ndim and _name(key) not in _ACCUMULATORS
    }

    def is_in_field(rest: _KeyPath) -> bool:  # and not in the state of another transformation
        return not rest or any(rest[: i + 1] in parameters for i in range(len(rest)))

    def is_memory(key_path: _KeyPath) -> bool:
        return any(
            key_path[:i] in owners and is_in_field(key_path[i + 1 :]) for i in range(len(key_path))
        )

    def chosen(new: Any, key_path: _KeyPath, old: Any) -> Any:
        if not is_memory(key_path):
            return old
        return new if new.dtype == old.dtype else new.astype(old.dtype)

    fresh_leaves = jax.tree.leaves(fresh, is_leaf=is_coded)
    return jax.tree.unflatten(
        treedef, [chosen(new, *leaf) for new, leaf in zip(fresh_leaves, leaves, strict=True)]
    )
