"""Compressed weights and memory-efficient training for JAX.

A compressed weight is a pytree node that stands where the dense array stood; every method is a pure
function from parameter pytrees to parameter pytrees; :func:`lift` runs any JAX function on them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lutjax.arrays import (
    DoubleQuant,
    LowRankArray,
    LutArray,
    SumArray,
    is_compressed,
    shardings_like,
)
from lutjax.lift import LiftReport, MaterializationError, MaterializationWarning, lift
from lutjax.transforms import (
    LutConfig,
    Recipe,
    Rule,
    combine,
    decompose,
    fuse_projections,
    materialize,
    partition,
    prepack,
    quantize,
    summarize,
)

if TYPE_CHECKING:
    from lutjax.io.compress import compress_checkpoint
    from lutjax.io.compressed import save
    from lutjax.io.load import load
    from lutjax.sparsity import SparsityPlan, sparsify

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
    "SparsityPlan",
    "SumArray",
    "combine",
    "compress_checkpoint",
    "decompose",
    "fuse_projections",
    "is_compressed",
    "lift",
    "load",
    "materialize",
    "partition",
    "prepack",
    "quantize",
    "save",
    "shardings_like",
    "sparsify",
    "summarize",
]


# What needs Flax is imported when it is first touched.
_LAZY = {
    "SparsityPlan": "lutjax.sparsity",
    "compress_checkpoint": "lutjax.io",
    "load": "lutjax.io",
    "save": "lutjax.io",
    "sparsify": "lutjax.sparsity",
}


_SUBPACKAGES = (
    "adapters",
    "allocate",
    "calibrate",
    "evaluate",
    "io",
    "linear_maps",
    "models",
    "optim",
    "sparsity",
)


def __getattr__(name: str) -> Any:
    """Imports the names of `_LAZY`, and subpackages, on first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lutjax.{name}")
    raise AttributeError(f"module 'lutjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is to use, imported or not."""
    return sorted({*__all__, *_SUBPACKAGES, "arrays", "transforms"})
