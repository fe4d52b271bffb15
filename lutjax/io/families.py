"""The model families that checkpoints may hold: what is the same for all models of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lutjax.io import experts, gemma, gpt_oss

_USUAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "partial_rotary_factor": (1,),
}
_GEMMA = {
    **_USUAL,
    # The first releases say "gelu" and mean the approximation, as transformers does.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` says without saying it.

    Attributes:
      defaults: what a config.json means that does not say it, where it is not what most mean.
      accepted: the values that some keys may have if they are there, the usual one first.
      qkv_bias: whether q, k and v have biases.
      qk_norm: whether q and k are normalised.
      window: whether the sliding window that a config.json has is for its layers (which of them,
        the family's own fields may say), is ignored, counts if `use_sliding_window` is set, or
        counts then from layer `max_window_layers` on.
      gguf: what GGUF files call the architecture, if it is not the `model_type`.
      gguf_width: GGUF's key of the width of what `DecoderConfig.intermediate_size` is.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=lambda: _USUAL)
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["given", "ignored", "if_used", "from_layer"] = "given"
    gguf: str | None = None
    gguf_width: str = "feed_forward_length"


FAMILIES: Mapping[str, Family] = {
    "llama": Family(window="ignored"),
    "mistral": Family(),
    "mixtral": Family(experts.DEFAULTS["mixtral"]),
    "qwen2": Family(
        accepted={key: _USUAL[key] for key in _USUAL if key != "attention_bias"},
        qkv_bias=True,  # as a part of the architecture, of which files say nothing
        window="from_layer",
    ),
    "qwen3": Family({"head_dim": 128}, qk_norm=True, window="from_layer"),
    "qwen3_moe": Family(
        experts.DEFAULTS["qwen3_moe"],
        qk_norm=True,
        window="if_used",
        gguf="qwen3moe",
        gguf_width="expert_feed_forward_length",
    ),
    "gemma": Family(gemma.DEFAULTS["gemma"], _GEMMA, window="ignored"),
    "gemma2": Family(gemma.DEFAULTS["gemma2"], _GEMMA),
    "gemma3_text": Family(gemma.DEFAULTS["gemma3_text"], _GEMMA, qk_norm=True, gguf="gemma3"),
    "gpt_oss": Family(
        gpt_oss.DEFAULTS["gpt_oss"],
        {**_USUAL, "attention_bias": (True,)},
        qkv_bias=True,
        gguf="gpt-oss",
        gguf_width="expert_feed_forward_length",
    ),
}
"""By Hugging Face's `model_type`; SmolLM2 is `llama`."""
