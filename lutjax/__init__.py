"""Compressed weights and memory-efficient training for JAX.

A compressed weight is a pytree node that stands where the dense array stood; every method is a pure
function from parameter pytrees to parameter pytrees; :func:`lift` runs any JAX function on them.
"""

from lutjax.arrays import DoubleQuant, LowRankArray, LutArray, SumArray, is_compressed
from lutjax.lift import LiftReport, MaterializationError, MaterializationWarning, lift
from lutjax.transforms import LutConfig, Recipe, Rule, materialize, quantize, summarize

__version__ = "0.1.0"

__all__ = [
    "DoubleQuant",
    "LiftReport",
    "LowRankArray",
    "LutArray",
    "LutConfig",
    "MaterializationError",
    "MaterializationWarning",
    "Recipe",
    "Rule",
    "SumArray",
    "is_compressed",
    "lift",
    "materialize",
    "quantize",
    "summarize",
]
