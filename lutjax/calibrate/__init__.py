"""Statistics from data: what a weight's error does to the loss, and to products."""

from lutjax.calibrate.activations import ActivationQuantiles, activation_quantiles
from lutjax.calibrate.costs import measure_costs, plannable
from lutjax.calibrate.decompose import decompose_blocks, decompose_decoder
from lutjax.calibrate.fisher import Fisher, fisher
from lutjax.calibrate.hessians import hessians
from lutjax.calibrate.histogram import MagnitudeHistogram
from lutjax.calibrate.learn_scales import learn_scales, rescale, scale_factors
from lutjax.calibrate.losses import kl_divergence, next_token_loss
from lutjax.calibrate.noise import noise_sensitivities
from lutjax.calibrate.observe import ObservedArray, observe
from lutjax.calibrate.probe import ProbedArray
from lutjax.calibrate.quantize import quantize_blocks, quantize_decoder

__all__ = [
    "ActivationQuantiles",
    "Fisher",
    "MagnitudeHistogram",
    "ObservedArray",
    "ProbedArray",
    "activation_quantiles",
    "decompose_blocks",
    "decompose_decoder",
    "fisher",
    "hessians",
    "kl_divergence",
    "learn_scales",
    "measure_costs",
    "next_token_loss",
    "noise_sensitivities",
    "observe",
    "plannable",
    "quantize_blocks",
    "quantize_decoder",
    "rescale",
    "scale_factors",
]
