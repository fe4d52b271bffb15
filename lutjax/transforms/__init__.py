"""Pure functions from parameter pytrees to parameter pytrees."""

from lutjax.transforms.materialize import materialize
from lutjax.transforms.partition import combine, partition
from lutjax.transforms.quantize import quantize, quantize_array
from lutjax.transforms.recipe import LutConfig, Recipe, Rule
from lutjax.transforms.summarize import LeafSummary, Summary, summarize

__all__ = [
    "LeafSummary",
    "LutConfig",
    "Recipe",
    "Rule",
    "Summary",
    "combine",
    "materialize",
    "partition",
    "quantize",
    "quantize_array",
    "summarize",
]
