"""A plain Flax decoder family, its key-value cache, and text generation."""

from lutjax.models.cache import KVCache, LayerCache, init_cache
from lutjax.models.config import DecoderConfig, RopeScaling
from lutjax.models.decoder import Decoder, abstract_params
from lutjax.models.generate import decode_step, generate, prefill
from lutjax.models.known import MODELS
from lutjax.models.sampling import greedy, sample
from lutjax.models.stacking import stack_layers, unstack_layers

__all__ = [
    "MODELS",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "LayerCache",
    "RopeScaling",
    "abstract_params",
    "decode_step",
    "generate",
    "greedy",
    "init_cache",
    "prefill",
    "sample",
    "stack_layers",
    "unstack_layers",
]
