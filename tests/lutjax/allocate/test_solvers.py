from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from lutjax.allocate import (
    InfeasibleBudgetError,
    pareto,
    solve_dp,
    solve_greedy,
    solve_ilp,
    solve_uniform,
)

# Costs of three matrices of 100, 200 and 100 weights at 2, 3 and 4 bits.
TOY_COSTS = np.array([[10, 4, 1], [6, 3, 2], [9, 2, 0.5]])
TOY_SIZES = np.array([[200, 300, 400], [400, 600, 800], [200, 300, 400]])


@pytest.mark.parametrize("solve", [solve_ilp, solve_dp])
@pytest.mark.parametrize(
    ("budget", "bits", "cost"),
    [(2.5, [3, 2, 3], 12), (3.0, [4, 2, 4], 7.5), (3.25, [4, 3, 3], 6), (4, [4, 4, 4], 3.5)],
)
def test_toy(solve, budget, bits, cost):
    choice = solve(TOY_COSTS, TOY_SIZES, int(budget * 400))
    assert (choice + 2).tolist() == bits
    assert TOY_COSTS[range(3), choice].sum() == cost


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    m, j = rng.integers(1, 6), rng.integers(1, 6)
    costs = rng.random((m, j)) * 10.0 ** rng.integers(-4, 5)
    sizes = rng.integers(1, 30, (m, j))
    if seed % 3 == 0:
        costs[rng.random((m, j)) < 0.3] = np.inf
        costs[:, 0] = 1.0
    smallest = np.where(np.isfinite(costs), sizes, 99).min(axis=1).sum()
    return costs, sizes, int(smallest + rng.integers(0, 40))


def brute_force(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    m, j = costs.shape
    return min(
        sum(costs[i, c] for i, c in enumerate(choice))
        for choice in itertools.product(range(j), repeat=m)
        if sum(sizes[i, c] for i, c in enumerate(choice)) <= budget
    )


@pytest.mark.parametrize("seed", range(40))
def test_against_brute_force(seed):
    costs, sizes, budget = instance(seed)
    best = brute_force(costs, sizes, budget)
    for solve in (solve_ilp, solve_dp, solve_greedy):
        choice = solve(costs, sizes, budget)
        rows = range(len(costs))
        assert sizes[rows, choice].sum() <= budget
        cost = costs[rows, choice].sum()
        if solve is solve_greedy:
            assert best <= cost * (1 + 1e-12)
        else:
            np.testing.assert_allclose(cost, best, rtol=1e-5)  # HiGHS stops at this gap


@pytest.mark.parametrize("seed", range(20))
def test_costs_that_nobody_can_avoid_hide_no_others(seed):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.random((5, 4)), axis=1)[:, ::-1] + 1e-6
    sizes = np.cumsum(rng.integers(5, 15, (5, 4)), axis=1)
    budget = int(sizes[:, 1].sum() + rng.integers(0, 20))
    best = brute_force(costs, sizes, budget)
    costs[0] += 1e7
    choice = solve_ilp(costs, sizes, budget)
    costs[0] -= 1e7
    assert sizes[range(5), choice].sum() <= budget
    np.testing.assert_allclose(costs[range(5), choice].sum(), best, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_larger_instances_agree_and_hold_the_budget(seed):
    rng = np.random.default_rng(seed)
    sizes = np.cumsum(rng.integers(10**6, 10**7, (60, 9)), axis=1)
    costs = rng.random((60, 1)) * 0.3 ** np.arange(9)[None] * rng.uniform(0.8, 1.2, (60, 9))
    budget = int(sizes[:, 3].sum())
    found = {}
    for solve in (solve_ilp, solve_dp, solve_greedy):
        choice = solve(costs, sizes, budget)
        assert sizes[range(60), choice].sum() <= budget
        found[solve] = costs[range(60), choice].sum()
    assert found[solve_ilp] <= found[solve_greedy] * (1 + 1e-9)
    assert found[solve_ilp] <= found[solve_dp] * (1 + 1e-5)
    # A discretisation to ten thousand units loses little; greedy is optimal up to one upgrade.
    assert found[solve_dp] <= 1.02 * found[solve_ilp]
    assert found[solve_greedy] <= 1.05 * found[solve_ilp]


@pytest.mark.parametrize("seed", range(3))
def test_many_matrices_of_few_kinds(seed):
    """As where only shapes are known. Told apart, HiGHS would not be done within its time."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, 300)
    sizes = np.cumsum(rng.integers(1, 9, (4, 12)), axis=1)[kinds] * 1000
    costs = -np.sort(-rng.exponential(size=(4, 12)), axis=1)[kinds]
    budget = int(sizes[:, 0].sum() + 0.4 * (sizes[:, -1] - sizes[:, 0]).sum())
    started = time.process_time()
    choice = solve_ilp(costs, sizes, budget)
    assert time.process_time() - started < 10
    index = np.arange(300)
    assert sizes[index, choice].sum() <= budget
    exact = solve_dp(costs, sizes, budget)  # 1000 divides all sizes
    found, best = costs[index, choice].sum(), costs[index, exact].sum()
    # Within the gap: 1e-4 of what can be avoided.
    assert best - 1e-9 <= found <= best + 1e-4 * (costs[:, 0] - costs[:, -1]).sum()


def test_uniform():
    assert solve_uniform(TOY_COSTS, TOY_SIZES, 1300).tolist() == [1, 1, 1]
    with pytest.raises(InfeasibleBudgetError, match="at least 800"):
        solve_uniform(TOY_COSTS, TOY_SIZES, 700)
    costs = np.array([[np.inf, 1.0], [1.0, np.inf]])
    with pytest.raises(ValueError, match="no configuration fits every matrix"):
        solve_uniform(costs, np.ones((2, 2), int), 10)


def test_pareto_keeps_ties_once():
    assert pareto(np.array([1, 1, 2, 3]), np.array([2.0, 1.0, 1.0, 0.5])) == [1, 3]
    assert pareto(np.array([1, 2]), np.array([np.inf, 1.0])) == [1]


@pytest.mark.parametrize("solve", [solve_ilp, solve_dp, solve_greedy])
def test_bad_input(solve):
    with pytest.raises(InfeasibleBudgetError, match="smallest feasible one is 800") as error:
        solve(TOY_COSTS, TOY_SIZES, 799)
    assert error.value.smallest == 800
    with pytest.raises(ValueError, match="matrix 1 has a cost that is NaN"):
        solve(np.where(TOY_COSTS == 3, np.nan, TOY_COSTS), TOY_SIZES, 1000)
    with pytest.raises(ValueError, match="matrix 2 has no configuration"):
        solve(np.where(np.arange(3)[:, None] == 2, np.inf, TOY_COSTS), TOY_SIZES, 1000)
    with pytest.raises(ValueError, match="not empty"):
        solve(np.zeros((0, 3)), np.zeros((0, 3), int), 10)
    with pytest.raises(ValueError, match="whole numbers"):
        solve(TOY_COSTS, TOY_SIZES + 0.5, 1000)
