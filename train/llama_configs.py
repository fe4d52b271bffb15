"""Llama configurations: those of the GaLore paper, and small ones for a laptop."""

from __future__ import annotations

from lutjax.models import DecoderConfig


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )


LLAMA = {
    "tiny": _llama(32, 88, 2, 2, 256),
    "1m": _llama(128, 352, 4, 4, 256),
    "7m": _llama(320, 864, 6, 5, 256),
    "60m": _llama(512, 1376, 8, 8, 32000),
    "130m": _llama(768, 2048, 12, 12, 32000),
    "350m": _llama(1024, 2736, 24, 16, 32000),
    "1b": _llama(2048, 5461, 24, 32, 32000),
    "7b": _llama(4096, 11008, 32, 32, 32000),
}
"""By name. ``tiny``, ``1m``, ``7m`` read bytes; the others are from arXiv 2403.03507, table 5."""

GALORE_RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
"""The ranks that the GaLore paper trains these with."""
