"""Layers in the formats of compressed-tensors, which llm-compressor writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec, integer_blocks, unpack_words, zero_point_form
from lutjax.io.byte_weights import ByteWeights, block_sizes
from lutjax.io.float4 import Float4
from lutjax.io.quantized_module import (
    UNUSED_PARTS,
    QuantizationMethod,
    QuantizedModule,
    group_layout,
    read_columns,
    scale_types,
)
from lutjax.io.safetensors import DTYPES

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
"""What can be read, by `format`."""


def from_config(config: Mapping[str, Any], source: str) -> QuantizationMethod:
    """Reads the `quantization_config` of a config.json.

    Raises:
      ValueError: if it has another format, several schemes, or one that is not supported.
    """
    kind = config.get("format")
    if kind not in FORMATS:
        raise ValueError(
            f"{source}: compressed-tensors with format={kind!r}; supported are {', '.join(FORMATS)}"
        )
    if transform := config.get("transform_config"):
        raise ValueError(
            f"{source}: compressed-tensors with transform_config={transform!r}, which is not "
            "supported: products would have to be rotated"
        )
    weights = _Weights(_scheme(config, source), source)
    if kind == "nvfp4-pack-quantized":
        weights.check(num_bits=(4,), type=("float",), group_size=(16,), symmetric=(True,))
        return Float4("weight_packed", 16, "weight_global_scale", divides=True)
    if kind == "mxfp4-pack-quantized":
        weights.check(num_bits=(4,), type=("float",), group_size=(32,), symmetric=(True,))
        return Float4("weight_packed", 32)
    if kind == "mxfp8-quantized":
        weights.check(num_bits=(8,), type=("float",), group_size=(32,), symmetric=(True,))
        return ByteWeights("F8_E4M3", ("weight_scale",), (1, 32))
    if kind == "pack-quantized":
        weights.check(
            num_bits=(4, 8), type=("int",), strategy=("group", "channel"), symmetric=(True, False)
        )
        symmetric = weights.values.get("symmetric", True)
        return PackedIntegers(weights.values["num_bits"], weights.group_size(), symmetric)
    weights.check(
        num_bits=(8,),
        type=("int", "float"),
        strategy=("tensor", "channel", "block", "group"),
        symmetric=(True,),
    )
    block = None
    if weights.values["strategy"] == "block":
        block = weights.values.get("block_structure")
        if isinstance(block, str):  # such as "128x128"
            block = [int(size) if size.isdecimal() else size for size in block.split("x")]
        block = block_sizes(block, f"{source}: compressed-tensors with block_structure")
    elif weights.values["strategy"] == "group" and weights.group_size() != -1:
        block = 1, weights.group_size()
    dtype = "I8" if weights.values["type"] == "int" else "F8_E4M3"
    return ByteWeights(dtype, ("weight_scale",), block)


def _scheme(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The part 'weights' of the only scheme."""
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
    return weights


@dataclasses.dataclass(frozen=True)
class _Weights:
    """What a scheme says of weights.

    Attributes:
      values: by key.
      source: what to call it in errors.
    """

    values: Mapping[str, Any]
    source: str

    def check(self, **supported: tuple[Any, ...]) -> None:
        """Raises ValueError unless each key has one of its values; `symmetric` defaults to true."""
        for key, accepted in supported.items():
            value = self.values.get(key, True if key == "symmetric" else None)
            if not any(type(value) is type(known) and value == known for known in accepted):
                raise ValueError(
                    f"{self.source}: compressed-tensors with {key}={value!r}; supported are "
                    f"{accepted}"
                )

    def group_size(self) -> int:
        """Inputs that share a scale; -1 for all."""
        size = self.values.get("group_size") if self.values.get("strategy") == "group" else -1
        if type(size) is not int or (size < 1 and size != -1):
            raise ValueError(f"{self.source}: compressed-tensors with group_size={size!r}")
        return size


@dataclasses.dataclass(frozen=True)
class PackedIntegers:
    """Weights (code - zero) · scale with the codes packed along the input axis ("pack-quantized").

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

    parts = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        *UNUSED_PARTS,
    )

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
