"""Compressed weights and memory-efficient training for JAX.

A compressed weight is a pytree node that stands where the dense array stood; every method is a pure
function from parameter pytrees to parameter pytrees; :func:`lift` runs any JAX function on them.
"""

from lutjax.arrays import DoubleQuant, LowRankArray, LutArray, SumArray, is_compressed
from lutjax.transforms import LutConfig, Recipe, Rule, materialize, quantize, summarize

__version__ = "0.1.0"

__all__ = [
    "DoubleQuant",
    "LowRankArray",
    "LutArray",
    "LutConfig",
    "Recipe",
    "Rule",
    "SumArray",
    "is_compressed",
    "materialize",
    "quantize",
    "summarize",
]
