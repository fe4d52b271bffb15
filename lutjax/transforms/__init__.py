"""Pure functions from parameter pytrees to parameter pytrees."""

from lutjax.transforms.decompose import (
    Decomposition,
    decompose,
    decompose_array,
    decompose_with_history,
)
from lutjax.transforms.fuse import fuse_projections
from lutjax.transforms.importance import RowColumnMeans
from lutjax.transforms.materialize import materialize
from lutjax.transforms.partition import combine, partition
from lutjax.transforms.prepack import prepack
from lutjax.transforms.quantize import quantize, quantize_array
from lutjax.transforms.recipe import LutConfig, Recipe, Rule
from lutjax.transforms.summarize import LeafSummary, Summary, summarize

__all__ = [
    "Decomposition",
    "LeafSummary",
    "LutConfig",
    "Recipe",
    "RowColumnMeans",
    "Rule",
    "Summary",
    "combine",
    "decompose",
    "decompose_array",
    "decompose_with_history",
    "fuse_projections",
    "materialize",
    "partition",
    "prepack",
    "quantize",
    "quantize_array",
    "summarize",
]
