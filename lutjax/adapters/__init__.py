"""Adapters: weights `W_0 + S^T lambda`, built from the maps that optimisers project with."""

from lutjax.adapters.array import AdapterArray, is_adapter
from lutjax.adapters.build import (
    kronecker,
    merge,
    one_sided,
    trainable,
    two_sided,
    with_trainable,
)
from lutjax.adapters.dual import AdapterState, AdapterTraining, dual

__all__ = [
    "AdapterArray",
    "AdapterState",
    "AdapterTraining",
    "dual",
    "is_adapter",
    "kronecker",
    "merge",
    "one_sided",
    "trainable",
    "two_sided",
    "with_trainable",
]
