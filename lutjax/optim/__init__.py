"""Memory-efficient optimisers as optax transformations."""

from lutjax.optim.aliases import flora, galore, lift, relora
from lutjax.optim.nonfinite import check_finite, first_nonfinite, leaf_name, skip_nonfinite
from lutjax.optim.project import ProjectState, project
from lutjax.optim.quantized import QuantizedState, quantized_state
from lutjax.optim.spam import scale_by_spam, spam

__all__ = [
    "ProjectState",
    "QuantizedState",
    "check_finite",
    "first_nonfinite",
    "flora",
    "galore",
    "leaf_name",
    "lift",
    "project",
    "quantized_state",
    "relora",
    "scale_by_spam",
    "skip_nonfinite",
    "spam",
]
