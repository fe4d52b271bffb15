"""Compressed weights and memory-efficient training for JAX.

A compressed weight is a pytree node that stands where the dense array stood; every method is a pure
function from parameter pytrees to parameter pytrees; :func:`lift` runs any JAX function on them.
"""

from __future__ import annotations

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
    materialize,
    partition,
    quantize,
    summarize,
)

if TYPE_CHECKING:
    from lutjax.io.compress import compress_checkpoint
    from lutjax.io.compressed import save
    from lutjax.io.load import load

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
    "combine",
    "compress_checkpoint",
    "decompose",
    "is_compressed",
    "lift",
    "load",
    "materialize",
    "partition",
    "quantize",
    "save",
    "shardings_like",
    "summarize",
]


def __getattr__(name: str) -> Any:
    """Imports `lutjax.io`, and Flax with it, when a checkpoint is first touched."""
    if name in ("compress_checkpoint", "load", "save"):
        from lutjax import io

        return getattr(io, name)
    raise AttributeError(f"module 'lutjax' has no attribute {name!r}")
