"""From config.json or GGUF metadata to `DecoderConfig`, and back to config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io import experts, gemma, gpt_oss
from lutjax.io.config_values import integer, positive
from lutjax.io.families import FAMILIES, Family
from lutjax.models.config import DecoderConfig, RopeScaling

TEXT_PREFIX = {"gemma3": "language_model."}
"""What begins the names of the text model's tensors, for models with several parts."""

SUPPORTED = (*FAMILIES, *TEXT_PREFIX)
"""The supported `model_type`s; of those with several parts, the text model is."""

# Where null means what a missing key means.
_NULLABLE = ("num_key_value_heads", "head_dim", "rope_scaling")

_FROM_GGUF = {family.gguf or name: name for name, family in FAMILIES.items()}


def config_from_hf(data: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """The decoder configuration that a Hugging Face config.json describes.

    Args:
      data: the parsed JSON object.
      source: what to call it in errors.

    Returns:
      The configuration, with float32 activations.

    Raises:
      ValueError: if the architecture is not supported, or a field is missing or of a kind that
        the decoder does not compute.

    >>> config = config_from_hf({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
    ...                          "intermediate_size": 8, "num_hidden_layers": 1,
    ...                          "num_attention_heads": 2})
    >>> config.num_kv_heads, config.head_dim
    (2, 2)
    """
    model_type = data.get("model_type")
    if model_type not in SUPPORTED:
        raise _unknown_architecture(model_type, source)
    if model_type in TEXT_PREFIX:
        return config_from_hf(_text_config(data, source), source)
    given = {key: data[key] for key in data if data[key] is not None or key not in _NULLABLE}
    family = FAMILIES[model_type]
    data = {**family.defaults, **given}
    _refuse_unsupported(data, model_type, source)
    heads = integer(data, "num_attention_heads", source)
    hidden = integer(data, "hidden_size", source)
    layers = integer(data, "num_hidden_layers", source)
    rope = _rope(data, source)
    return DecoderConfig(
        vocab_size=integer(data, "vocab_size", source),
        hidden_size=hidden,
        intermediate_size=integer(data, experts.width_key(model_type), source),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=integer(data, "num_key_value_heads", source, heads),
        head_dim=integer(data, "head_dim", source, hidden // heads),
        max_position_embeddings=integer(data, "max_position_embeddings", source, 2048),
        rms_norm_eps=positive(data, "rms_norm_eps", source, 1e-6),
        rope_theta=positive(rope if "rope_theta" in rope else data, "rope_theta", source, 1e4),
        rope_scaling=_rope_scaling(rope, source),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(data, family, layers, source),
        model_type=model_type,
        **gemma.fields_from_hf(data, model_type, layers, source),
        **experts.fields_from_hf(data, model_type, source),
        **gpt_oss.fields_from_hf(data, model_type, layers, source),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json object from which `config_from_hf` makes the same configuration.

    Args:
      config: the configuration; `scan_layers`, `remat` and `dtype` are not part of the file.

    Returns:
      A JSON-serialisable object in Hugging Face's terms.

    Raises:
      ValueError: if no such file could be read, because its `model_type` is none of a family.
    """
    if config.model_type not in FAMILIES:
        raise _unknown_architecture(config.model_type, "the configuration")
    data: dict[str, Any] = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
    }
    for module in (gemma, experts, gpt_oss):
        data |= module.fields_to_hf(config)
    if FAMILIES[config.model_type].window in ("if_used", "from_layer"):
        data |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    scaling = config.rope_scaling
    if scaling is not None:
        data["rope_scaling"] = {
            "linear": {"rope_type": "linear", "factor": scaling.factor},
            "factors": {"rope_type": "factors", "factors": list(scaling.factors)},
            "llama3": {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            },
            "yarn": {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_slow": scaling.low_freq_factor,
                "beta_fast": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            },
        }[scaling.kind]
    return data


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    tied: bool,
    vocab_size: int,
    rope_factors: np.ndarray | None,
    source: str,
) -> DecoderConfig:
    """The decoder configuration that a GGUF file describes.

    Args:
      metadata: the file's key-value pairs.
      tied: whether the file has no output head of its own.
      vocab_size: rows of its embedding table.
      rope_factors: its tensor `rope_freqs.weight`, `[head_dim / 2]`, or None.
      source: what to call it in errors.

    Returns:
      The configuration, with float32 activations.

    Raises:
      ValueError: if the architecture or its RoPE scaling is not supported or a key is missing.
    """
    architecture: Any = metadata.get("general.architecture")
    model_type = _FROM_GGUF.get(architecture, architecture)
    if model_type not in SUPPORTED:
        raise _unknown_architecture(architecture, source)
    if model_type == "llama" and metadata.get("llama.expert_count"):
        model_type = "mixtral"
    fields: dict[str, Any] = {
        key.removeprefix(f"{architecture}."): _decimal(value) if isinstance(value, float) else value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    heads = integer(fields, "attention.head_count", source)
    hidden = integer(fields, "embedding_length", source)
    layers = integer(fields, "block_count", source)
    head_dim = integer(fields, "attention.key_length", source, hidden // heads)
    if (rotated := fields.get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(
            f"{source}: rope.dimension_count={rotated} leaves a part of each head of {head_dim} as "
            "it is, which is not supported"
        )
    family = FAMILIES[model_type]
    mixture = experts.fields_from_gguf(fields, model_type, source)
    window = fields.get("attention.sliding_window") or None
    if model_type == "gpt_oss":
        window = integer(fields, "attention.sliding_window", source)
    if model_type == "gemma2" and window is None:
        window = gemma.DEFAULTS["gemma2"]["sliding_window"]
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=integer(fields, family.gguf_width, source),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=integer(fields, "attention.head_count_kv", source, heads),
        head_dim=head_dim,
        max_position_embeddings=integer(fields, "context_length", source, 2048),
        rms_norm_eps=positive(fields, "attention.layer_norm_rms_epsilon", source, 1e-5),
        rope_theta=positive(fields, "rope.freq_base", source, 1e4),
        rope_scaling=_gguf_rope_scaling(fields, rope_factors, model_type, source),
        tie_embeddings=tied,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        model_type=model_type,
        **gemma.fields_from_gguf(fields, model_type, layers, window),
        **gpt_oss.fields_from_gguf(model_type, layers),
        **mixture,
    )


def _text_config(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The configuration of the text model of one with several parts."""
    text = data.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{source}: 'text_config' is {text!r}, not a JSON object")
    return {"model_type": f"{data['model_type']}_text"} | text


def _unknown_architecture(name: Any, source: str) -> ValueError:
    return ValueError(
        f"{source} has the architecture {name!r}; supported are {', '.join(SUPPORTED)}"
    )


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(np.format_float_scientific(np.float32(value)))


def _refuse_unsupported(data: Mapping[str, Any], model_type: str, source: str) -> None:
    for key, accepted in FAMILIES[model_type].accepted.items():
        if data.get(key) is not None and data[key] not in accepted:
            raise ValueError(
                f"{source}: {key}={data[key]!r} is not supported for {model_type!r}; only "
                f"{accepted[0]!r} is"
            )


def _rope(data: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """What config.json says of the rotary frequencies beside their base; empty if nothing."""
    # transformers 5 writes rope_parameters, which holds the base as well.
    key = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    rope = data.get(key) or {}
    if isinstance(rope, dict) and "full_attention" in rope:
        rope = rope["full_attention"]  # Gemma 3 has one for each kind of layer
    if not isinstance(rope, dict):
        raise ValueError(f"{source}: {key!r} is {data[key]!r}, not a JSON object")
    return rope


def _rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    where = f"{source}: RoPE scaling {dict(rope)}"
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where} leaves a part of each head as it is, which is not supported")
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None and "factor" in rope:
        raise ValueError(f"{where} does not name its 'rope_type'; it may be 'linear'")
    if kind in (None, "default"):
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=positive(rope, "factor", where))
    if kind == "factors":
        return RopeScaling("factors", factors=tuple(rope.get("factors") or ()))
    if kind == "yarn":
        return _yarn({key: value for key, value in rope.items() if value is not None}, where)
    if kind != "llama3":
        raise ValueError(
            f"{source}: RoPE scaling {kind!r} is not supported; supported are default, linear, "
            "llama3, yarn"
        )
    scaling = RopeScaling(
        "llama3",
        factor=positive(rope, "factor", where),
        low_freq_factor=positive(rope, "low_freq_factor", where),
        high_freq_factor=positive(rope, "high_freq_factor", where),
        original_max_position_embeddings=integer(rope, "original_max_position_embeddings", where),
    )
    if math.isclose(scaling.low_freq_factor, scaling.high_freq_factor):
        raise ValueError(f"{where} has a low_freq_factor that equals its high_freq_factor")
    return scaling


def _yarn(rope: Mapping[str, Any], where: str) -> RopeScaling:
    """YaRN with the defaults of transformers, which are those of llama.cpp, too."""
    known = "attention_factor" in rope
    if not known and rope.get("mscale") and rope.get("mscale_all_dim"):
        raise ValueError(f"{where} has mscale and mscale_all_dim, which are not supported")
    factor = positive(rope, "factor", where)
    # arXiv 2309.00071, equation 22
    attention_factor = 0.1 * math.log(max(factor, 1.0)) + 1.0
    scaling = RopeScaling(
        "yarn",
        factor=factor,
        low_freq_factor=positive(rope, "beta_slow", where, 1.0),
        high_freq_factor=positive(rope, "beta_fast", where, 32.0),
        original_max_position_embeddings=integer(rope, "original_max_position_embeddings", where),
        attention_factor=positive(rope, "attention_factor", where, attention_factor),
        truncate=bool(rope.get("truncate", True)),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(f"{where} has a beta_slow that is not below its beta_fast")
    return scaling


def _gguf_rope_scaling(
    fields: Mapping[str, Any], factors: np.ndarray | None, model_type: str, source: str
) -> RopeScaling | None:
    """As llama.cpp reads it: linear if no type is given, and divided by a tensor's factors too."""
    kind = fields.get("rope.scaling.type", "linear")
    if kind == "yarn" and factors is None:
        return _gguf_yarn(fields, model_type, source)
    if kind not in ("none", "linear"):
        beside = " with rope_freqs.weight" if kind == "yarn" else ""
        raise ValueError(f"{source}: rope.scaling.type {kind!r} is not supported{beside}")
    key = "rope.scaling.factor" if "rope.scaling.factor" in fields else "rope.scale_linear"
    factor = 1.0
    if kind == "linear" and fields.get(key, 0.0) != 0.0:  # 0 is for files without scaling
        factor = positive(fields, key, source)
    if factors is not None:
        return RopeScaling("factors", factors=tuple(factor * float(value) for value in factors))
    return None if factor == 1.0 else RopeScaling("linear", factor=factor)


def _gguf_yarn(fields: Mapping[str, Any], model_type: str, source: str) -> RopeScaling:
    neutral = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
    for name, value in neutral.items():
        if fields.get(f"rope.scaling.{name}", value) != value:
            raise ValueError(f"{source}: rope.scaling.{name} is not supported")
    names = {
        "factor": "factor",
        "beta_slow": "yarn_beta_slow",
        "beta_fast": "yarn_beta_fast",
        "original_max_position_embeddings": "original_context_length",
    }
    rope = {
        key: fields[f"rope.scaling.{name}"]
        for key, name in names.items()
        if f"rope.scaling.{name}" in fields
    }
    rope["truncate"] = model_type != "gpt_oss"  # which files do not say
    return _yarn(rope, f"{source}: RoPE scaling {rope}")


def _sliding_window(
    data: Mapping[str, Any], family: Family, layers: int, source: str
) -> int | None:
    unused = family.window in ("if_used", "from_layer") and not data.get("use_sliding_window")
    if family.window == "ignored" or unused or data.get("sliding_window") is None:
        return None
    window = integer(data, "sliding_window", source)
    if family.window != "from_layer":
        return window
    first = integer(data, "max_window_layers", source, 28, least=0)
    if first >= layers:
        return None
    if first > 0:
        raise ValueError(
            f"{source}: max_window_layers={first} gives only some of the {layers} layers a "
            "sliding window, which is not supported"
        )
    return window
