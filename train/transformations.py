"""Invertible transformations of a grid task: a rule, turned, is a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from train.tasks import Grid, Pair, Query, Task, Value, to_grid


@dataclasses.dataclass(frozen=True)
class Transformation:
    """A change of every grid of a task, and how to undo it.

    >>> rotate = SYMMETRIES[1]
    >>> rotate.apply(((1, 2), (3, 4)))
    ((2, 4), (1, 3))
    >>> rotate.invert(rotate.apply(((1, 2), (3, 4))))
    ((1, 2), (3, 4))
    """

    name: str
    apply: Callable[[Grid], Grid]
    invert: Callable[[Grid], Grid]

    def task(self, task: Task) -> Task:
        """The task with all its grids changed."""
        return Task(
            task.name,
            tuple(Pair(*map(self._value, pair)) for pair in task.demonstrations),
            tuple(
                Query(self._value(q.input), None if q.output is None else self._value(q.output))
                for q in task.queries
            ),
        )

    def _value(self, value: Value) -> Value:
        return value if isinstance(value, str) else self.apply(value)


def _symmetry(turns: int, flip: bool) -> Transformation:
    def apply(grid: Grid) -> Grid:
        array = np.asarray(grid)
        return to_grid(np.rot90(array[:, ::-1] if flip else array, turns).tolist())

    def invert(grid: Grid) -> Grid:
        array = np.rot90(np.asarray(grid), -turns)
        return to_grid((array[:, ::-1] if flip else array).tolist())

    words = [f"rotate {90 * turns}"] * (turns > 0) + ["flip"] * flip
    return Transformation(" of ".join(words) or "identity", apply, invert)


SYMMETRIES = tuple(_symmetry(turns, flip) for flip in (False, True) for turns in range(4))
"""Those of the square; the first one changes nothing."""


def recolouring(rng: np.random.Generator) -> Transformation:
    """A random permutation of the colours 1 to 9; 0 stays, as most tasks have it as background."""
    colours = np.concatenate([[0], 1 + rng.permutation(9)])
    back = np.argsort(colours)
    return Transformation(
        "colours " + "".join(map(str, colours)),
        lambda grid: to_grid(colours[np.asarray(grid)].tolist()),
        lambda grid: to_grid(back[np.asarray(grid)].tolist()),
    )
