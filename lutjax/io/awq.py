"""Layers quantised by AWQ, as AutoAWQ stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec, integer_blocks, unpack_words, zero_point_form
from lutjax.io.quantized_module import HALF_TYPES, QuantizedModule, group_layout
from lutjax.io.safetensors import DTYPES

BITS = 4

# Where each of eight neighbouring outputs lies in a word: its nibbles are 0, 2, 4, 6, 1, 3, 5, 7.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Weights (code - zero) · scale with four-bit codes packed along the output axis.

    `qweight` int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]`, `scales` `[groups, out]`.

    Attributes:
      group_size: inputs that share a scale; -1 for all.

    Source: AWQ (arXiv 2306.00978); https://github.com/casper-hansen/AutoAWQ, version "gemm".
    """

    group_size: int

    parts = ("qweight", "qzeros", "scales")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> AWQ:
        """Reads the `quantization_config` of a config.json.

        Raises:
          ValueError: if it has other bits, groups or another version.
        """
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size", -1))
        version = config.get("version") or config.get("checkpoint_format") or "gemm"
        if bits != BITS:
            raise ValueError(f"{source}: AWQ with bits={bits!r}; supported is {BITS}")
        if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
            raise ValueError(f"{source}: AWQ with group_size={group_size!r}; it is positive or -1")
        if str(version).lower() != "gemm":
            raise ValueError(f"{source}: AWQ with version={version!r}; supported is 'gemm'")
        return cls(group_size)

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers; see `QuantizationMethod`."""
        k, words = module.info("qweight", ("I32",)).shape
        n = 8 * words
        group_size, groups = group_layout(k, self.group_size)
        module.info("qzeros", ("I32",), (groups, words))
        dtype = DTYPES[module.info("scales", HALF_TYPES, (groups, n)).dtype]
        return GridSpec(
            shape=(n, k),
            bits=BITS,
            group_size=group_size,
            scales=dtype,
            offsets=zero_point_form(BITS, dtype),
        )

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer; see `QuantizationMethod`."""
        return integer_blocks(
            _unpack(module.read("qweight")).T,
            _unpack(module.read("qzeros")).T,
            module.read("scales").T,
            bits=BITS,
            group_size=self.check(module).group_size,
        )


def _unpack(words: np.ndarray) -> np.ndarray:
    nibbles = unpack_words(words, BITS).reshape(*words.shape, 8)
    return nibbles[..., _NIBBLES].reshape(words.shape[0], -1)
