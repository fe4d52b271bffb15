"""A plain Flax decoder family, its key-value cache, and text generation."""

from lutjax.models.cache import KVCache, LayerCache, init_cache
from lutjax.models.config import DecoderConfig, RopeScaling
from lutjax.models.decoder import Decoder
from lutjax.models.stacking import stack_layers, unstack_layers

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "LayerCache",
    "RopeScaling",
    "init_cache",
    "stack_layers",
    "unstack_layers",
]
