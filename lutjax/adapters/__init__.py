"""Adapters: weights `W_0 + S^T lambda`, built from the maps that optimisers project with."""

from lutjax.adapters import lora, multi
from lutjax.adapters.array import AdapterArray, is_adapter
from lutjax.adapters.build import (
    kronecker,
    one_sided,
    trainable,
    two_sided,
    with_trainable,
)
from lutjax.adapters.dual import AdapterState, AdapterTraining, dual
from lutjax.adapters.lora import merge
from lutjax.adapters.workers import merge_workers, start_worker

__all__ = [
    "AdapterArray",
    "AdapterState",
    "AdapterTraining",
    "dual",
    "is_adapter",
    "kronecker",
    "lora",
    "merge",
    "merge_workers",
    "multi",
    "one_sided",
    "start_worker",
    "trainable",
    "two_sided",
    "with_trainable",
]
