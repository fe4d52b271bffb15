"""Layers whose weights are bytes: FP8 and INT8 with a scale for the matrix, a row or a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec, float8_values, powers_of_two
from lutjax.io.quantized_module import (
    BFLOAT16,
    EXPONENTS,
    UNUSED_PARTS,
    QuantizedModule,
    scale_types,
)
from lutjax.io.safetensors import DTYPES


@dataclasses.dataclass(frozen=True)
class ByteWeights:
    """Weights value(byte) · scale.

    `weight` `[out, in]` of float8 (E4M3) or int8, and scales: one for the matrix, `[]` or `[1]`,
    one for each output, `[out]` or `[out, 1]`, or one for each block of outputs and inputs,
    `[ceil(out / rows), ceil(in / columns)]`. Scales of uint8 or float8 (E8M0) are exponents of two
    (MXFP8), kept as bfloat16.

    Attributes:
      dtype: of the weights, as safetensors name it: `"F8_E4M3"` or `"I8"`.
      scales: what the suffix of the scales may be.
      block: outputs and inputs that share a scale; None if all of an output's inputs do.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433); DeepSeek-V3 (arXiv 2412.19437, section
    3.3), whose blocks `quant_method` `fp8` has; OCP Microscaling Formats (MX) 1.0.
    """

    dtype: str
    scales: tuple[str, ...]
    block: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """See `QuantizationMethod`."""
        return ("weight", *self.scales, *UNUSED_PARTS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> ByteWeights:
        """Reads the `quantization_config` of a config.json with `quant_method` `fp8`.

        Raises:
          ValueError: if the format is not E4M3, or blocks are not of two positive sizes.
        """
        if (kind := config.get("fmt")) not in (None, "e4m3", "float8_e4m3fn"):
            raise ValueError(f"{source}: fp8 with fmt={kind!r}; supported is 'e4m3'")
        block = config.get("weight_block_size")
        if block is not None:
            block = block_sizes(block, f"{source}: fp8 with weight_block_size")
        return cls("F8_E4M3", ("weight_scale_inv", "weight_scale"), block)

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers; see `QuantizationMethod`."""
        n, k = module.info("weight", (self.dtype,)).shape
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (n,), (n, 1))
        if self.block is not None:
            shapes = ((-(-n // self.block[0]), -(-k // self.block[1])),)
        types = (*scale_types(symmetric=True), *EXPONENTS)
        scales = module.info(self._scale(module), types, *shapes)
        group_size = k if self.block is None else min(self.block[1], k)
        dtype = BFLOAT16 if scales.dtype in EXPONENTS else DTYPES[scales.dtype]
        return GridSpec((n, k), 8, group_size, dtype, None)

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer; see `QuantizationMethod`."""
        spec = self.check(module)
        codes = module.read("weight").view(np.uint8)
        if self.dtype == "I8":
            codes, levels = codes ^ np.uint8(128), np.arange(-128, 128, dtype=np.float32)
        else:
            levels = float8_values()
            of_nan = np.abs(levels) > 448
            if of_nan[codes].any():
                levels[of_nan] = np.nan
        n = spec.shape[0]
        scales = module.read(self._scale(module))
        rows = self.block[0] if self.block is not None else n // scales.size
        if scales.dtype.itemsize == 1:
            scales = powers_of_two(scales.view(np.uint8), 127)
        scales = np.repeat(scales.reshape(-1, 1) if self.block is None else scales, rows, axis=0)
        return GridBlocks(codes, levels, scales[:n], None, spec.group_size)

    def _scale(self, module: QuantizedModule) -> str:
        return next((suffix for suffix in self.scales if module.has(suffix)), self.scales[0])


def block_sizes(block: Any, source: str) -> tuple[int, int]:
    """Two positive sizes.

    >>> block_sizes([128, 128], "config.json")
    (128, 128)
    """
    sizes = tuple(block) if isinstance(block, (list, tuple)) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{source}={block!r}; it is two positive numbers")
    return sizes
