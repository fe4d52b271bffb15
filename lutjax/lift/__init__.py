"""Run any JAX function on compressed parameters."""

from lutjax.lift.api import lift, report
from lutjax.lift.report import LiftReport, MaterializationError, MaterializationWarning, Use

__all__ = [
    "LiftReport",
    "MaterializationError",
    "MaterializationWarning",
    "Use",
    "lift",
    "report",
]
