"""Statistics from data: what a weight's error does to the loss."""

from lutjax.calibrate.activations import ActivationQuantiles, activation_quantiles
from lutjax.calibrate.costs import measure_costs, plannable
from lutjax.calibrate.fisher import Fisher, fisher
from lutjax.calibrate.histogram import MagnitudeHistogram
from lutjax.calibrate.losses import next_token_loss
from lutjax.calibrate.noise import noise_sensitivities
from lutjax.calibrate.observe import ObservedArray, observe
from lutjax.calibrate.probe import ProbedArray

__all__ = [
    "ActivationQuantiles",
    "Fisher",
    "MagnitudeHistogram",
    "ObservedArray",
    "ProbedArray",
    "activation_quantiles",
    "fisher",
    "measure_costs",
    "next_token_loss",
    "noise_sensitivities",
    "observe",
    "plannable",
]
