"""Mixtures of experts: their configurations, and their experts as one tensor.

Mixtral's and Qwen3-MoE's Hugging Face checkpoints have a tensor for each matrix of each expert;
GGUF files have them stacked.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec
from lutjax.io.config_values import integer
from lutjax.io.readers import TensorInfo, TensorReader
from lutjax.models.config import DecoderConfig

DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
"""What a config.json means that does not say it, by `model_type`."""

_FAMILIES = (*DEFAULTS, "gpt_oss")

# Mixtral's names and what the table of names (`lutjax.io.names`) has.
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(
    r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight"
)
_ROUTER = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.gate\.weight")


def fields_from_hf(data: Mapping[str, Any], model_type: str, source: str) -> dict[str, Any]:
    """The fields of `DecoderConfig` that only mixtures set; none for other families.

    Args:
      data: a parsed config.json, with `DEFAULTS`.
      model_type: its `model_type`.
      source: what to call it in errors.

    Raises:
      ValueError: if some layers have no experts, or a number makes no sense.
    """
    if model_type not in _FAMILIES:
        return {}
    if data.get("mlp_only_layers") or data.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{source}: mlp_only_layers={data.get('mlp_only_layers')} and decoder_sparse_step="
            f"{data.get('decoder_sparse_step', 1)} leave some layers without experts, which is not "
            "supported"
        )
    # transformers 5 calls them local in all families.
    key = "num_experts" if data.get("num_local_experts") is None else "num_local_experts"
    return {
        "num_experts": integer(data, key, source),
        "num_experts_per_tok": integer(data, "num_experts_per_tok", source),
        "norm_topk_prob": model_type != "qwen3_moe" or bool(data.get("norm_topk_prob", False)),
    }


def width_key(model_type: str) -> str:
    """The key in config.json of the width of what `DecoderConfig.intermediate_size` is.

    >>> width_key("mixtral"), width_key("qwen3_moe")
    ('intermediate_size', 'moe_intermediate_size')
    """
    return "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"


def fields_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """What config.json says of the experts; nothing for other families."""
    if config.num_experts is None:
        return {}
    return {
        "num_local_experts": config.num_experts,
        "num_experts": config.num_experts,  # as transformers 4 has it for Qwen3-MoE
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        width_key(config.model_type): config.intermediate_size,
    }


def fields_from_gguf(fields: Mapping[str, Any], model_type: str, source: str) -> dict[str, Any]:
    """The fields of `DecoderConfig` that only mixtures set; none for other families.

    Raises:
      ValueError: if a number makes no sense.
    """
    if not fields.get("expert_count") and model_type not in _FAMILIES:
        return {}
    return {
        "num_experts": integer(fields, "expert_count", source),
        "num_experts_per_tok": integer(fields, "expert_used_count", source),
    }


class ExpertsReader(TensorReader):
    """Tensors of which those of a block's experts are one.

    It is called `…mlp.experts.up_proj.weight` and has the shape `[E, out, in]`. Mixtral's names
    become those of Qwen3-MoE.
    """

    def __init__(self, reader: TensorReader, count: int, source: str) -> None:
        """Puts the experts' tensors together.

        Args:
          reader: the tensors as they are stored.
          count: experts of a block.
          source: what to call the checkpoint in errors.

        Raises:
          ValueError: naming the tensor of an expert that is missing, or is unlike the others'.
        """
        self._reader = reader
        experts: dict[str, dict[int, str]] = {}
        self._renamed: dict[str, str] = {}
        for name in reader.infos:
            if match := _EXPERT.fullmatch(name):
                layer, expert, matrix = match.groups()
                whole = f"{layer}mlp.experts.{_MIXTRAL.get(matrix, matrix)}.weight"
                experts.setdefault(whole, {})[int(expert)] = name
            elif match := _ROUTER.fullmatch(name):
                self._renamed[f"{match[1]}mlp.gate.weight"] = name
            else:
                self._renamed[name] = name
        infos = {name: reader.infos[stored] for name, stored in self._renamed.items()}
        self._experts = {
            whole: _all_of(members, count, source) for whole, members in experts.items()
        }
        for whole, members in self._experts.items():
            first, spec = reader.infos[members[0]], reader.grid_spec(members[0])
            for member in members:
                info = reader.infos[member]
                alike = (info.shape, info.dtype) == (first.shape, first.dtype)
                if not alike or reader.grid_spec(member) != spec:
                    raise ValueError(
                        f"{source}: tensor {member!r} of type {info.dtype} and shape "
                        f"{list(info.shape)} is not stored as {members[0]!r} is"
                    )
            # Its place in the file stays that of the first expert.
            infos[whole] = dataclasses.replace(first, shape=(count, *first.shape))
        self.infos: Mapping[str, TensorInfo] = infos

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which `read` gives a tensor.

        Raises:
          KeyError: if there is no such tensor.
        """
        return self._reader.dtype(self.stored_name(name))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, or those of all experts.

        Raises:
          KeyError: if there is no such tensor.
        """
        if name not in self._experts:
            return self._reader.read(self._renamed[name])
        return np.stack([self._reader.read(member) for member in self._experts[name]])

    def stored_name(self, name: str) -> str:
        """The tensor of the files that a tensor is read from, that of the first expert for all."""
        return self._experts[name][0] if name in self._experts else self._renamed[name]

    def grid_spec(self, name: str) -> GridSpec | None:
        """What the headers say of weights that are stored as codes; None for any other tensor."""
        spec = self._reader.grid_spec(self.stored_name(name))
        if spec is None or name not in self._experts:
            return spec
        return dataclasses.replace(spec, shape=(len(self._experts[name]), *spec.shape))

    def read_grid(self, name: str) -> GridBlocks:
        """Reads weights that are stored as codes as codes, scales and offsets.

        Raises:
          KeyError: if there is no such weight.
        """
        if name not in self._experts:
            return self._reader.read_grid(self._renamed[name])
        return GridBlocks.stack([self._reader.read_grid(member) for member in self._experts[name]])

    def is_zero_bias(self, name: str) -> bool:
        """Whether a tensor is a quantised layer's bias of zeros, which some tools always write."""
        return self._reader.is_zero_bias(self._renamed.get(name, name))


def _all_of(members: Mapping[int, str], count: int, source: str) -> list[str]:
    """The names of a matrix of all experts, in order."""
    missing = [i for i in range(count) if i not in members]
    surplus = [name for i, name in members.items() if i >= count]
    if surplus:
        raise ValueError(f"{source}: tensor {surplus[0]!r} has no place among {count} experts")
    if missing:
        like = next(iter(members.values()))
        raise ValueError(
            f"{source}: the tensor of expert {missing[0]} is missing beside {like!r}; the "
            f"configuration has {count} experts"
        )
    return [members[i] for i in range(count)]
