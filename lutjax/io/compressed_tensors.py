"""Layers in the format "pack-quantized" of compressed-tensors, which llm-compressor writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec, integer_blocks, unpack_words, zero_point_form
from lutjax.io.quantized_module import QuantizedModule, group_layout, read_columns, scale_types
from lutjax.io.safetensors import DTYPES

FORMAT = "pack-quantized"
BITS = (4, 8)


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """Weights (code - zero) · scale with the codes packed along the input axis.

    `weight_packed` int32 `[out, in * bits / 32]`, `weight_scale` `[out, groups]`, for asymmetric
    schemes `weight_zero_point` int32 `[out * bits / 32, groups]`, and `weight_shape`. The integers
    are signed in the library and packed after 2**(bits - 1) was added, which the difference of code
    and zero point does not see.

    Attributes:
      bits: bits of a code.
      group_size: inputs that share a scale; -1 for all.
      symmetric: whether there are no zero points.

    Source: https://github.com/vllm-project/compressed-tensors.
    """

    bits: int
    group_size: int
    symmetric: bool

    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> CompressedTensors:
        """Reads the `quantization_config` of a config.json.

        Raises:
          ValueError: if it has another format, several schemes, or one that is not supported.
        """
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{source}: compressed-tensors with format={config.get('format')!r}; supported is "
                f"{FORMAT!r}"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise ValueError(
                f"{source}: compressed-tensors with config_groups={groups!r}; supported is one"
            )
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(
                f"{source}: compressed-tensors with the scheme {group!r}; supported are schemes "
                "whose 'weights' are spelled out"
            )
        if group.get("input_activations"):
            raise ValueError(
                f"{source}: compressed-tensors with quantised activations; supported are schemes "
                "that quantise weights only, such as W4A16"
            )
        strategy = weights.get("strategy")
        supported = {"num_bits": BITS, "type": ("int",), "strategy": ("group", "channel")}
        for key, accepted in supported.items():
            if weights.get(key) not in accepted:
                raise ValueError(
                    f"{source}: compressed-tensors with {key}={weights.get(key)!r}; supported are "
                    f"{accepted}"
                )
        size = weights.get("group_size") if strategy == "group" else -1
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(f"{source}: compressed-tensors with group_size={size!r}")
        return cls(weights["num_bits"], size, bool(weights.get("symmetric", True)))

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers; see `QuantizationMethod`."""
        n, words = module.info("weight_packed", ("I32",)).shape
        k = words * 32 // self.bits
        group_size, groups = group_layout(k, self.group_size)
        scales = module.info("weight_scale", scale_types(self.symmetric), (n, groups))
        if not self.symmetric:
            zero_words = -(-n * self.bits // 32)
            module.info("weight_zero_point", ("I32",), (zero_words, groups))
        if module.has("weight_shape"):
            module.info("weight_shape", ("I32", "I64"), (2,))
        if module.has("weight_g_idx"):
            module.info("weight_g_idx", ("I32", "I64"), (k,))
        dtype = DTYPES[scales.dtype]
        return GridSpec(
            shape=(n, k),
            bits=self.bits,
            group_size=group_size,
            scales=dtype,
            offsets=None if self.symmetric else zero_point_form(self.bits, dtype),
            reordered=module.has("weight_g_idx"),
        )

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer; see `QuantizationMethod`."""
        spec = self.check(module)
        scales = module.read("weight_scale")
        columns = read_columns(
            module, "weight_g_idx", groups=scales.shape[1], group_size=spec.group_size
        )
        codes = unpack_words(module.read("weight_packed"), self.bits)
        zeros: np.ndarray | int = 2 ** (self.bits - 1)
        if not self.symmetric:
            packed = module.read("weight_zero_point")
            zeros = unpack_words(packed.T, self.bits).T[: spec.shape[0]]
        return integer_blocks(
            codes,
            zeros,
            scales,
            bits=self.bits,
            group_size=spec.group_size,
            columns=columns,
        )
