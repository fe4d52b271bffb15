"""Activation sparsity: thresholds, their allocation, and the parameters they turn into."""

from lutjax.sparsity.apply import sparsify
from lutjax.sparsity.greedy import BlockSearch, GreedySearch, greedy_search
from lutjax.sparsity.measure import AchievedSparsity, measure_sparsity
from lutjax.sparsity.phases import PhasedParams, phased
from lutjax.sparsity.plan import Gate, SparsityPlan
from lutjax.sparsity.thresholds import plan_greedy, plan_thresholds, plan_uniform, recalibrate

__all__ = [
    "AchievedSparsity",
    "BlockSearch",
    "Gate",
    "GreedySearch",
    "PhasedParams",
    "SparsityPlan",
    "greedy_search",
    "measure_sparsity",
    "phased",
    "plan_greedy",
    "plan_thresholds",
    "plan_uniform",
    "recalibrate",
    "sparsify",
]
