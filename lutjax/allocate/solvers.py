r"""One configuration for each matrix under a budget: the multiple-choice knapsack problem.

All solvers take the same numbers and return, for each matrix, the index of its configuration:

.. math:: \min \sum_{i} c_{i j_i} \quad \text{subject to} \quad \sum_i s_{i j_i} \le B

Costs that are not finite mark configurations that a matrix cannot have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Costs = Float[np.ndarray, "m j"]
Sizes = Int[np.ndarray, "m j"]
Chosen = Int[np.ndarray, " m"]

# HiGHS stops when it has proved its solution this close to the optimum, relative to its cost, but
# not further from it than the second number relative to what of that cost can be avoided.
_GAP, _AVOIDABLE_GAP = 1e-5, 1e-4
_TIME_LIMIT = 20.0  # seconds; then its best solution so far, which many matrices may need


class InfeasibleBudgetError(ValueError):
    """No choice of configurations fits the budget.

    Attributes:
      smallest: The smallest total size that is possible.
    """

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


def solve_ilp(costs: Costs, sizes: Sizes, budget: int) -> Chosen:
    """The best choice, by integer linear programming with HiGHS.

    Args:
      costs: ``float[M, J]``; inf where configuration j does not exist for matrix i.
      sizes: ``int[M, J]``, in any unit.
      budget: The largest total size, in that unit.

    Returns:
      ``int[M]``.

    Raises:
      InfeasibleBudgetError: If even the smallest configurations exceed the budget.
      ValueError: If a matrix has no configuration, or a cost is NaN.

    Source: LQ-LoRA (arXiv 2311.12023, section 3.2).

    >>> costs = np.array([[10, 4, 1], [6, 3, 2], [9, 2, 0.5]])
    >>> sizes = np.array([[200, 300, 400], [400, 600, 800], [200, 300, 400]])
    >>> solve_ilp(costs, sizes, budget=1000).tolist()  # 2.5 bits for 400 weights
    [1, 0, 1]
    """
    costs, sizes = _checked(costs, sizes, budget)
    # Costs that nobody can avoid would hide the others from a gap relative to all of them.
    least = costs.min(axis=1, keepdims=True)
    costs = costs - least
    greedy = solve_greedy(costs, sizes, budget)
    avoidable = _total(costs, greedy)
    gap = min(_GAP * (1 + least.sum() / avoidable), _AVOIDABLE_GAP) if avoidable > 0 else _GAP
    # Matrices that are alike are counted, not told apart: there would be a solution for each order.
    kinds = np.hstack([costs, sizes])
    _, first, alike = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they come
    first, alike = first[order], np.argsort(order)[alike.reshape(-1)]
    counts = np.bincount(alike)
    core = np.zeros((len(counts), costs.shape[1]), bool)
    np.logical_or.at(core, alike, _core(costs, sizes, budget, greedy))
    rows, columns = np.nonzero(core)
    value, size = costs[first[rows], columns], sizes[first[rows], columns].astype(np.float64)
    members = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    limit = budget
    # HiGHS allows itself a small violation: where that shows in whole units, ask for less.
    for _ in range(5):
        result = milp(
            value / max(value.max(), np.finfo(float).tiny),
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, counts[rows]),
            constraints=[
                LinearConstraint(members, counts, counts),
                LinearConstraint(size[None] / budget, -np.inf, limit / budget),
            ],
            options={"mip_rel_gap": gap, "time_limit": _TIME_LIMIT},
        )
        if result.x is None:
            break
        # Rows ascend, so the matrices of each kind take their configurations in order.
        choice = np.empty(len(costs), np.int64)
        choice[np.argsort(alike, kind="stable")] = np.repeat(columns, result.x.round().astype(int))
        excess = int(_total(sizes, choice)) - budget
        if excess <= 0:
            return min(choice, greedy, key=lambda choice: _total(costs, choice))
        limit -= excess
    return greedy


def solve_dp(costs: Costs, sizes: Sizes, budget: int, *, resolution: int | None = None) -> Chosen:
    """The best choice, by dynamic programming over discretised sizes.

    Sizes beyond the smallest are rounded up to units of ``1 / resolution`` of the room they share,
    so that the budget holds; where that unit divides all of them, the result is the optimum.

    Args:
      costs: As in :func:`solve_ilp`.
      sizes: As in :func:`solve_ilp`.
      budget: As in :func:`solve_ilp`.
      resolution: Number of units; by default 10,000, and at least 50 for each matrix.

    Returns:
      ``int[M]``.

    Raises:
      InfeasibleBudgetError: If even the smallest configurations exceed the budget.
      ValueError: If a matrix has no configuration, or a cost is NaN.

    Source: HIGGS (arXiv 2411.17525, section 5).

    >>> costs = np.array([[10, 4, 1], [6, 3, 2], [9, 2, 0.5]])
    >>> sizes = np.array([[200, 300, 400], [400, 600, 800], [200, 300, 400]])
    >>> solve_dp(costs, sizes, budget=1300).tolist()
    [2, 1, 1]
    """
    costs, sizes = _checked(costs, sizes, budget)
    allowed = _efficient(costs, sizes)
    beyond = sizes - _smallest(costs, sizes)[:, None]
    room = int(budget - _smallest(costs, sizes).sum())
    resolution = resolution or max(10_000, 50 * len(costs))
    divisor = math.gcd(*(int(b) for b in np.unique(beyond[allowed]))) or 1
    unit = max(divisor, -(-room // resolution))
    units = np.where(allowed, -(-beyond // unit), 0)
    capacity = room // unit
    best = np.zeros(capacity + 1)  # least cost of the matrices so far within u units
    choices = np.zeros((len(costs), capacity + 1), np.int16)
    for i in range(len(costs)):
        new = np.full(capacity + 1, np.inf)
        for j in np.nonzero(allowed[i])[0]:
            step = int(units[i, j])
            if step > capacity:
                continue
            total = best[: capacity + 1 - step] + costs[i, j]
            better = total < new[step:]
            new[step:][better] = total[better]
            choices[i, step:][better] = j
        best = new
    choice = np.zeros(len(costs), np.int64)
    left = capacity
    for i in reversed(range(len(costs))):
        choice[i] = choices[i, left]
        left -= int(units[i, choice[i]])
    return choice


def solve_greedy(costs: Costs, sizes: Sizes, budget: int) -> Chosen:
    """A good choice: from the smallest, the upgrades with the best gain per size that still fit.

    Upgrades run along each matrix's lower convex hull of cost over size, so that the result is the
    optimum of the relaxed problem up to the last upgrade.

    Args:
      costs: As in :func:`solve_ilp`.
      sizes: As in :func:`solve_ilp`.
      budget: As in :func:`solve_ilp`.

    Returns:
      ``int[M]``.

    Raises:
      InfeasibleBudgetError: If even the smallest configurations exceed the budget.
      ValueError: If a matrix has no configuration, or a cost is NaN.

    >>> solve_greedy(np.array([[4.0, 1.0], [3.0, 2.0]]), np.array([[1, 2], [1, 2]]), 3).tolist()
    [1, 0]
    """
    costs, sizes = _checked(costs, sizes, budget)
    allowed = _efficient(costs, sizes)
    hulls = [_hull(costs[i], sizes[i], allowed[i]) for i in range(len(costs))]
    upgrades = sorted(
        ((costs[i, b] - costs[i, a]) / (sizes[i, b] - sizes[i, a]), i, step)
        for i, hull in enumerate(hulls)
        for step, (a, b) in enumerate(itertools.pairwise(hull))
    )
    position = np.zeros(len(costs), np.int64)
    room = budget - sum(int(sizes[i, hull[0]]) for i, hull in enumerate(hulls))
    for _, i, step in upgrades:
        if position[i] != step:  # an earlier upgrade of this matrix did not fit
            continue
        extra = int(sizes[i, hulls[i][step + 1]] - sizes[i, hulls[i][step]])
        if extra <= room:
            position[i] += 1
            room -= extra
    return np.array([hull[p] for hull, p in zip(hulls, position, strict=True)])


def solve_uniform(costs: Costs, sizes: Sizes, budget: int) -> Chosen:
    """The best choice among those that give every matrix the same configuration.

    Args:
      costs: As in :func:`solve_ilp`.
      sizes: As in :func:`solve_ilp`.
      budget: As in :func:`solve_ilp`.

    Returns:
      ``int[M]``, all equal.

    Raises:
      InfeasibleBudgetError: If no single configuration fits.
      ValueError: If no configuration exists for every matrix, or a cost is NaN.

    >>> solve_uniform(np.array([[4.0, 1.0], [3.0, 2.0]]), np.array([[1, 2], [1, 2]]), 3).tolist()
    [0, 0]
    """
    costs, sizes = _checked(costs, sizes, None)
    common = np.isfinite(costs).all(axis=0)
    if not common.any():
        raise ValueError("no configuration fits every matrix; use another solver")
    totals = np.where(common, sizes.sum(axis=0), np.iinfo(np.int64).max)
    if totals.min() > budget:
        raise InfeasibleBudgetError(
            f"budget {budget} is too small: one configuration for all matrices takes at least "
            f"{totals.min()}",
            int(totals.min()),
        )
    total_costs = np.where(totals <= budget, np.where(common, costs, 0).sum(axis=0), np.inf)
    return np.full(len(costs), int(np.argmin(total_costs)))


SOLVERS: dict[str, Callable[[Costs, Sizes, int], Chosen]] = {
    "ilp": solve_ilp,
    "dp": solve_dp,
    "greedy": solve_greedy,
    "uniform": solve_uniform,
}
"""Solvers by name."""


def pareto(sizes: Float[np.ndarray, " j"], costs: Float[np.ndarray, " j"]) -> list[int]:
    """Indices of the configurations that no other beats in both size and cost, smallest first.

    >>> pareto(np.array([3, 1, 2, 2]), np.array([1.0, 5.0, 6.0, 4.0]))
    [1, 3, 0]
    """
    keep: list[int] = []
    for j in np.lexsort((costs, sizes)):
        if np.isfinite(costs[j]) and (not keep or costs[j] < costs[keep[-1]]):
            keep.append(int(j))
    return keep


def _checked(costs: Costs, sizes: Sizes, budget: int | None) -> tuple[Costs, Sizes]:
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes)
    if costs.ndim != 2 or costs.shape != sizes.shape or not costs.size:
        raise ValueError(
            f"costs and sizes have the shapes {costs.shape} and {sizes.shape}; both must be "
            f"[matrices, configurations] and not empty"
        )
    if not np.issubdtype(sizes.dtype, np.integer):
        if (sizes != np.round(sizes)).any():
            raise ValueError("sizes must be whole numbers, such as bits or bytes")
        sizes = sizes.astype(np.int64)
    if np.isnan(costs).any() or (costs == -np.inf).any():
        bad = int(np.argwhere(np.isnan(costs) | (costs == -np.inf))[0, 0])
        raise ValueError(f"matrix {bad} has a cost that is NaN or -inf")
    without = np.nonzero(~np.isfinite(costs).any(axis=1))[0]
    if len(without):
        raise ValueError(f"matrix {without[0]} has no configuration with a finite cost")
    if budget is not None and (smallest := int(_smallest(costs, sizes).sum())) > budget:
        raise InfeasibleBudgetError(
            f"budget {budget} is too small: the smallest feasible one is {smallest}", smallest
        )
    return costs, sizes.astype(np.int64)


def _smallest(costs: Costs, sizes: Sizes) -> Int[np.ndarray, " m"]:
    return np.where(np.isfinite(costs), sizes, np.iinfo(np.int64).max).min(axis=1)


def _efficient(costs: Costs, sizes: Sizes) -> Bool[np.ndarray, "m j"]:
    """Which configurations can be part of an optimum."""
    mask = np.zeros(costs.shape, bool)
    for i in range(len(costs)):
        mask[i, pareto(sizes[i], costs[i])] = True
    return mask


def _core(costs: Costs, sizes: Sizes, budget: int, known: Chosen) -> Bool[np.ndarray, "m j"]:
    """Which configurations an optimum can have, given a known choice.

    For a price per size, ``sum_i min_j (c_ij + price s_ij) - price budget`` is a lower bound of the
    cost. Choosing j for matrix i raises it by j's distance from that minimum: beyond the known
    cost, j is out of the question.
    """
    allowed = _efficient(costs, sizes)
    prices = {0.0}
    for i in range(len(costs)):
        hull = _hull(costs[i], sizes[i], allowed[i])
        prices |= {
            float((costs[i, a] - costs[i, b]) / (sizes[i, b] - sizes[i, a]))
            for a, b in itertools.pairwise(hull)
        }
    ordered = sorted(prices)
    masked = np.where(allowed, costs, np.inf)

    def bound(price: float) -> float:
        return float((masked + price * sizes).min(axis=1).sum() - price * budget)

    low, high = 0, len(ordered) - 1  # the bound is concave in the price
    while low < high:
        middle = (low + high) // 2
        if bound(ordered[middle]) < bound(ordered[middle + 1]):
            low = middle + 1
        else:
            high = middle
    price = ordered[low]
    distance = masked + price * sizes
    distance -= distance.min(axis=1, keepdims=True)
    cost = float(costs[np.arange(len(costs)), known].sum())
    gap = cost - bound(price)
    keep = distance <= gap + 1e-9 * abs(cost)
    keep[np.arange(len(costs)), known] = True
    return keep & allowed


def _hull(cost: np.ndarray, size: np.ndarray, allowed: np.ndarray) -> list[int]:
    """Indices on the lower convex hull of cost over size, smallest first."""
    hull: list[int] = []
    for j in sorted(np.nonzero(allowed)[0], key=lambda j: size[j]):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (cost[b] - cost[a]) * (size[j] - size[b]) < (cost[j] - cost[b]) * (
                size[b] - size[a]
            ):
                break
            hull.pop()
        hull.append(int(j))
    return hull


def _total(numbers: Costs | Sizes, choice: Chosen) -> float:
    return numbers[np.arange(len(numbers)), choice].sum()
