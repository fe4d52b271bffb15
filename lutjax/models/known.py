"""Configurations of well-known models, for plans and measurements without their weights."""

from __future__ import annotations

from lutjax.models.config import DecoderConfig

# Tokens, width, width of MLPs, layers, heads, heads of keys, width of a head, context.
MODELS: dict[str, DecoderConfig] = {
    "smollm2-135m": DecoderConfig(
        49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=1e5, tie_embeddings=True
    ),
    "llama-2-7b": DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "llama-2-13b": DecoderConfig(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "llama-2-70b": DecoderConfig(32000, 8192, 28672, 80, 64, 8, 128, 4096),
    "llama-3-8b": DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=5e5),
    "llama-3-70b": DecoderConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope_theta=5e5),
    "mistral-7b": DecoderConfig(
        32000, 4096, 14336, 32, 32, 8, 128, 32768, sliding_window=4096, model_type="mistral"
    ),
}
"""Configurations by name, each of the first release, with float32 activations."""
