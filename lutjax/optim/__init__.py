"""Memory-efficient optimisers as optax transformations."""

from lutjax.optim.aliases import flora, galore, lift, relora
from lutjax.optim.project import ProjectState, project

__all__ = ["ProjectState", "flora", "galore", "lift", "project", "relora"]
