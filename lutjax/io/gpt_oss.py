"""gpt-oss: what its configurations say beyond those of other families, and its MXFP4 experts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec, powers_of_two, unpack_words
from lutjax.io.config_values import layer_types, layers_by_period, positive, sliding_layers
from lutjax.io.float4 import E2M1_LEVELS
from lutjax.io.quantized_module import BFLOAT16
from lutjax.io.readers import TensorInfo, TensorReader
from lutjax.io.safetensors import SafetensorsReader
from lutjax.models.config import DecoderConfig

MODEL_TYPE = "gpt_oss"
QUANT_METHOD = "mxfp4"

DEFAULTS: dict[str, dict[str, Any]] = {
    MODEL_TYPE: {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    }
}
"""What a config.json means that does not say it, by `model_type`."""

_GROUP = 32

# What a tensor of experts holds: matrices of the decoder's, and which of its outputs they are.
_MATRICES = {
    "gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)},
    "down_proj": {"down_proj": slice(None)},
}
_EXPERTS = re.compile(
    r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)(_bias|_blocks|_scales|)"
)


def fields_from_hf(
    data: Mapping[str, Any], model_type: str, layers: int, source: str
) -> dict[str, Any]:
    """The fields of `DecoderConfig` that only gpt-oss sets; none for other families.

    Args:
      data: a parsed config.json, with `DEFAULTS`.
      model_type: its `model_type`.
      layers: the number of layers.
      source: what to call it in errors.

    Raises:
      ValueError: for an activation or a kind of layer that the decoder does not compute.
    """
    if model_type != MODEL_TYPE:
        return {}
    if data["swiglu_alpha"] != DEFAULTS[MODEL_TYPE]["swiglu_alpha"]:
        raise ValueError(
            f"{source}: swiglu_alpha={data['swiglu_alpha']!r} is not supported; only 1.702 is"
        )
    windowed = data["sliding_window"] is not None
    return _family_fields(positive(data, "swiglu_limit", source)) | {
        "sliding_layers": sliding_layers(data, layers, source) if windowed else None,
    }


def fields_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The entries of config.json that only gpt-oss has; none for other families."""
    if config.model_type != MODEL_TYPE:
        return {}
    data: dict[str, Any] = {"swiglu_limit": config.swiglu_limit, "attention_bias": True}
    if config.rope_scaling is None:  # which a missing key would not mean
        data["rope_scaling"] = {"rope_type": "default"}
    if config.sliding_layers is not None:
        data["layer_types"] = layer_types(config.sliding_layers)
    return data


def fields_from_gguf(model_type: str, layers: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` that only gpt-oss sets; none for other families.

    Args:
      model_type: the family's `model_type`.
      layers: the number of layers.
    """
    if model_type != MODEL_TYPE:
        return {}
    defaults = DEFAULTS[MODEL_TYPE]
    return _family_fields(defaults["swiglu_limit"]) | {
        "sliding_layers": layers_by_period(defaults["sliding_window_pattern"], layers)
    }


def _family_fields(swiglu_limit: float) -> dict[str, Any]:
    return {
        "activation": "gelu_sigmoid",
        "swiglu_limit": swiglu_limit,
        "o_bias": True,
        "attention_sinks": True,
        "expert_bias": True,
    }


def checkpoint_name(name: str) -> str:
    """What a tensor is called in checkpoints of gpt-oss, where other families call it `name`.

    In GGUF files the second norm of a block has the name of one of what attention gives.
    """
    return name.replace(".mlp.gate.", ".mlp.router.").replace(".ffn_norm.", ".post_attention_norm.")


def check_quantization(config: Any, source: str) -> None:
    """Checks the `quantization_config` of a config.json; the tensors say the rest.

    Raises:
      ValueError: if it is of another method than MXFP4.
    """
    name = config.get("quant_method") if isinstance(config, dict) else config
    if name != QUANT_METHOD:
        raise ValueError(
            f"{source} describes weights of {MODEL_TYPE!r} quantised by {name!r}; supported is "
            f"{QUANT_METHOD}"
        )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where a matrix of all experts is stored, or its biases.

    Attributes:
      name: the stored tensor.
      rows: which of the stored outputs.
    """

    name: str
    rows: slice


class GptOssReader(TensorReader):
    """The tensors of a Hugging Face directory, with the experts as other mixtures have them.

    Gates and what they are multiplied by alternate along one axis there, and are
    `…mlp.experts.gate_proj.weight` and `…up_proj.weight` of shape `[E, out, in]` here. They are
    dense, `gate_up_proj [E, in, 2 · out]`, or MXFP4: `gate_up_proj_blocks`
    `uint8[E, 2 · out, in / 32, 16]` has two codes a byte, the first in the low half, and
    `gate_up_proj_scales` `uint8[E, 2 · out, in / 32]` has the exponents of their scales, plus 127.

    Source: OCP Microscaling Formats (MX) 1.0; gpt-oss (arXiv 2508.10925).
    """

    def __init__(self, reader: SafetensorsReader, source: str) -> None:
        """Takes the experts' tensors apart.

        Args:
          reader: the tensors as they are stored.
          source: what to call the checkpoint in errors.

        Raises:
          ValueError: naming a tensor of another shape or dtype than it must have.
        """
        self._reader, self._source = reader, source
        self._parts: dict[str, _Part] = {}
        self._specs: dict[str, GridSpec] = {}
        infos: dict[str, TensorInfo] = {}
        for stored, info in reader.infos.items():
            match = _EXPERTS.fullmatch(stored)
            if match is None:
                infos[stored] = info
                continue
            prefix, matrix, kind = match.groups()
            if kind == "_scales":
                if (blocks := stored.replace("_scales", "_blocks")) not in reader.infos:
                    raise self._error(blocks, f"is missing beside {stored!r}")
                continue
            for ours, rows in _MATRICES[matrix].items():
                name = f"{prefix}{ours}.{'bias' if kind == '_bias' else 'weight'}"
                if name in self._parts:
                    other = self._parts[name].name
                    raise self._error(stored, f"is there beside {other!r}, which is the same")
                shape = self._shape(stored, kind, rows)
                self._parts[name] = _Part(stored, rows)
                infos[name] = dataclasses.replace(info, shape=shape)
                if kind == "_blocks":
                    self._specs[name] = GridSpec(shape, 4, _GROUP, BFLOAT16, None)
        self.infos: Mapping[str, TensorInfo] = infos

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which `read` gives a tensor: the stored one, float32 if it is quantised.

        Raises:
          KeyError: if there is no such tensor.
        """
        if name in self._specs:
            return np.dtype(np.float32)
        return self._reader.dtype(self.stored_name(name))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32 if it is quantised.

        Raises:
          KeyError: if there is no such tensor.
        """
        if name in self._specs:
            return self.read_grid(name).dense()
        if name not in self._parts:
            return self._reader.read(name)
        part = self._parts[name]
        tensor = self._reader.read_part(part.name, (..., part.rows))
        return tensor if name.endswith(".bias") else tensor.swapaxes(-1, -2)

    def stored_name(self, name: str) -> str:
        """The tensor of the files that a tensor is read from."""
        return self._parts[name].name if name in self._parts else name

    def grid_spec(self, name: str) -> GridSpec | None:
        """What the headers say of weights in MXFP4; None for any other tensor."""
        return self._specs.get(name)

    def read_grid(self, name: str) -> GridBlocks:
        """Reads weights in MXFP4 as codes and scales.

        Raises:
          KeyError: if there are no such weights.
        """
        if name not in self._specs:
            raise KeyError(name)
        part = self._parts[name]
        rows = slice(None), part.rows
        blocks = self._reader.read_part(part.name, rows)
        exponents = self._reader.read_part(_scales_beside(part.name), rows)
        codes = unpack_words(blocks.reshape(*blocks.shape[:2], -1), 4)
        return GridBlocks(codes, E2M1_LEVELS, powers_of_two(exponents, 127), None, _GROUP)

    def _shape(self, stored: str, kind: str, rows: slice) -> tuple[int, ...]:
        """The shape of what the outputs `rows` of a stored tensor are here."""
        info = self._reader.infos[stored]
        if len(info.shape) != {"_bias": 2, "_blocks": 4}.get(kind, 3):
            raise self._error(stored, f"has shape {list(info.shape)}, of the wrong rank")
        experts, *axes = info.shape
        if kind == "_bias":
            return experts, len(range(axes[0])[rows])
        if kind != "_blocks":
            return experts, len(range(axes[1])[rows]), axes[0]
        if info.dtype != "U8" or axes[2] != _GROUP // 2:
            raise self._error(
                stored,
                f"of dtype {info.dtype} and shape {list(info.shape)} must be of U8 and end with "
                f"{_GROUP // 2}",
            )
        scales = self._reader.infos.get(_scales_beside(stored))
        if scales is None:
            raise self._error(_scales_beside(stored), "is missing")
        if (scales.dtype, scales.shape) != ("U8", info.shape[:3]):
            raise self._error(
                _scales_beside(stored),
                f"of dtype {scales.dtype} and shape {list(scales.shape)} must be of U8 and have "
                f"shape {list(info.shape[:3])}",
            )
        return experts, len(range(axes[0])[rows]), axes[1] * _GROUP

    def _error(self, stored: str, problem: str) -> ValueError:
        return ValueError(f"{self._source}: tensor {stored!r} {problem}")


def _scales_beside(blocks: str) -> str:
    return blocks.removesuffix("_blocks") + "_scales"
