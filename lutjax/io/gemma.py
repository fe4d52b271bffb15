"""What the configurations of Gemma say beyond those of other families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lutjax.io.config_values import layer_types, layers_by_period, positive, sliding_layers
from lutjax.models.config import DecoderConfig

_COMMON: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _COMMON,
    "gemma2": _COMMON
    | {
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _COMMON
    | {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}
"""What a config.json means that does not say it, by `model_type`."""

# GGUF files do not say what queries are scaled by. llama.cpp takes hidden_size / num_heads instead
# of head_dim for the largest models, which it knows by their numbers of layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


def fields_from_hf(
    data: Mapping[str, Any], model_type: str, layers: int, source: str
) -> dict[str, Any]:
    """The fields of `DecoderConfig` that only Gemma sets; none for other families.

    Args:
      data: a parsed config.json, with `DEFAULTS`.
      model_type: its `model_type`.
      layers: the number of layers.
      source: what to call it in errors.

    Raises:
      ValueError: for a kind of layer or a RoPE scaling that the decoder does not compute.
    """
    if model_type not in DEFAULTS:
        return {}
    if model_type == "gemma":
        return _family_fields(model_type)
    scalar, windowed = data["query_pre_attn_scalar"], data["sliding_window"] is not None
    return _family_fields(model_type) | {
        "query_pre_attn_scalar": None if scalar == data["head_dim"] else scalar,
        "attn_logit_softcapping": data.get("attn_logit_softcapping"),
        "final_logit_softcapping": data.get("final_logit_softcapping"),
        "sliding_layers": sliding_layers(data, layers, source) if windowed else None,
        "sliding_rope_theta": _sliding_rope_theta(data, source) if windowed else None,
    }


def fields_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The entries of config.json that only Gemma has; none for other families."""
    if config.model_type not in DEFAULTS:
        return {}
    data = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    if config.model_type == "gemma":
        return data
    return data | {
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "layer_types": layer_types(config.windowed),
        "rope_local_base_freq": config.sliding_rope_theta,
    }


def fields_from_gguf(
    fields: Mapping[str, Any], model_type: str, layers: int, window: int | None
) -> dict[str, Any]:
    """The fields of `DecoderConfig` that only Gemma sets; none for other families.

    Args:
      fields: the file's metadata under the architecture's name.
      model_type: the family's `model_type`.
      layers: the number of layers.
      window: the sliding window.
    """
    if model_type not in DEFAULTS:
        return {}
    if model_type == "gemma":
        return _family_fields(model_type)
    defaults = DEFAULTS[model_type]
    found = _family_fields(model_type) | {
        name: fields.get(name, defaults.get(name))
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    if layers == _LAYERS_OF_27B[model_type]:
        hidden, heads = fields["embedding_length"], fields["attention.head_count"]
        found["query_pre_attn_scalar"] = hidden // heads
    if window is not None:
        pattern = fields.get("attention.sliding_window_pattern", defaults["sliding_window_pattern"])
        listed = isinstance(pattern, list)  # for each layer
        found["sliding_layers"] = (
            tuple(map(bool, pattern)) if listed else layers_by_period(pattern, layers)
        )
        theta = fields.get("rope.freq_base_swa", defaults.get("rope_local_base_freq"))
        found["sliding_rope_theta"] = theta
    return found


def _family_fields(model_type: str) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "post_norms": model_type != "gemma",
        "activation": "gelu_tanh",
        "scale_embeddings": True,
    }


def _sliding_rope_theta(data: Mapping[str, Any], source: str) -> float | None:
    """The rotary base of the layers with a window, where it is another one."""
    rope = (data.get("rope_parameters") or {}).get("sliding_attention") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{source}: RoPE scaling {rope['rope_type']!r} in layers with a sliding window is not "
            "supported"
        )
    if "rope_theta" in rope:
        return positive(rope, "rope_theta", source)
    if data.get("rope_local_base_freq") is None:
        return None
    return positive(data, "rope_local_base_freq", source)
