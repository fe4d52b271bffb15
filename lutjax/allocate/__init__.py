"""Which configuration for which matrix under a budget: numbers in, a plan out."""

from lutjax.allocate.budget import Budget
from lutjax.allocate.grid import candidate_grid, higgs_grid, nominal_bits, prune, stored_bytes
from lutjax.allocate.plan import Choice, CostTable, Matrix, Plan, allocate
from lutjax.allocate.plot import plot_plan
from lutjax.allocate.solvers import (
    SOLVERS,
    InfeasibleBudgetError,
    pareto,
    solve_dp,
    solve_greedy,
    solve_ilp,
    solve_uniform,
)

__all__ = [
    "SOLVERS",
    "Budget",
    "Choice",
    "CostTable",
    "InfeasibleBudgetError",
    "Matrix",
    "Plan",
    "allocate",
    "candidate_grid",
    "higgs_grid",
    "nominal_bits",
    "pareto",
    "plot_plan",
    "prune",
    "solve_dp",
    "solve_greedy",
    "solve_ilp",
    "solve_uniform",
    "stored_bytes",
]
