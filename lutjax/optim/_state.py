"""Moments inside the state of an arbitrary optimiser: which leaves they are, and carrying them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import optax

from lutjax.paths import path_string

FIRST_MOMENTS = frozenset({"mu", "trace", "ema"})
"""State fields of optax that are linear in the gradients."""

SECOND_MOMENTS = frozenset({"nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col"})
"""State fields of optax that are sums of squares."""


def field_name(key: Any) -> str | None:
    """The name, if a key of a path is a field of a named tuple or dataclass."""
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else None


def map_moments(
    function: Callable[[str, Literal[1, 2], Any], Any], state: Any, paths: Collection[str]
) -> tuple[Any, int]:
    """Applies `function(path, order, moment)` to the moments of the parameters `paths`.

    Args:
      function: Gets the parameter's path, 1 or 2 for the order of the moment, and the moment.
      state: The state of any optax transformation.
      paths: Parameters whose moments are meant.

    Returns:
      The new state and the number of first moments that were found.
    """
    found = 0

    def visit(key_path: tuple[Any, ...], leaf: Any) -> Any:
        nonlocal found
        for i, key in enumerate(key_path):
            order: Literal[1, 2] = 1 if field_name(key) in FIRST_MOMENTS else 2
            if order == 2 and field_name(key) not in SECOND_MOMENTS:
                continue
            path = path_string(key_path[i + 1 :])
            if path in paths:
                found += order == 1
                return function(path, order, leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(visit, state), found


def restart(fresh: Any, state: Any) -> Any:
    """`fresh`, with the positions in learning-rate schedules taken from `state`.

    A reset forgets moments and their step counts (bias correction starts again), but not where
    training is on its schedule.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda new, old: old if is_schedule(new) else new, fresh, state, is_leaf=is_schedule
    )
