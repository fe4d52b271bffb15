"""Statistics from data: what a weight's error does to the loss."""

from lutjax.calibrate.costs import measure_costs, plannable
from lutjax.calibrate.fisher import Fisher, fisher
from lutjax.calibrate.losses import next_token_loss
from lutjax.calibrate.probe import ProbedArray

__all__ = [
    "Fisher",
    "ProbedArray",
    "fisher",
    "measure_costs",
    "next_token_loss",
    "plannable",
]
