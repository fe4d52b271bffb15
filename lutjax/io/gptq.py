"""Layers quantised by GPTQ, as AutoGPTQ and GPTQModel store them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec, integer_blocks, unpack_words, zero_point_form
from lutjax.io.quantized_module import QuantizedModule, group_layout, read_columns, scale_types
from lutjax.io.safetensors import DTYPES

BITS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Weights (code - zero) · scale with the codes packed along the input axis.

    `qweight` int32 `[in * bits / 32, out]`, `qzeros` int32 `[groups, out * bits / 32]`, `scales`
    `[groups, out]`, `g_idx` int32 `[in]`, the group of each input. Codes follow each other without
    gaps, also over the ends of words.

    Attributes:
      bits: bits of a code.
      group_size: inputs that share a scale; -1 for all.
      symmetric: whether all zero points are 2**(bits - 1).
      zero_shift: what was subtracted from the zero points before they were packed: 1 in the format
        `gptq`, where 0 wraps around, and 0 in `gptq_v2`.
      reordered: whether the inputs were sorted before they were grouped (`desc_act`).

    Source: GPTQ (arXiv 2210.17323); https://github.com/AutoGPTQ/AutoGPTQ and
    https://github.com/ModelCloud/GPTQModel.
    """

    bits: int
    group_size: int
    symmetric: bool
    zero_shift: int
    reordered: bool

    parts = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> GPTQ:
        """Reads the `quantization_config` of a config.json.

        Raises:
          ValueError: if it has other bits, groups or another format, or options by layer.
        """
        bits, group_size = config.get("bits"), config.get("group_size", -1)
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        words = config.get("pack_dtype") or "int32"
        if bits not in BITS:
            raise ValueError(f"{source}: GPTQ with bits={bits!r}; supported are {BITS}")
        if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
            raise ValueError(f"{source}: GPTQ with group_size={group_size!r}; it is positive or -1")
        if words != "int32":
            raise ValueError(f"{source}: GPTQ with pack_dtype={words!r}; supported is 'int32'")
        # Patterns that begin with "-:" are of layers that are left as they are.
        for pattern, options in (config.get("dynamic") or {}).items():
            if options and not pattern.startswith("-:"):
                raise ValueError(
                    f"{source}: GPTQ with other options for some layers (dynamic: {pattern!r} has "
                    f"{options!r}) is not supported; quantise all layers with the same"
                )
        if config.get("is_marlin_format"):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"{source}: GPTQ with checkpoint_format={layout!r}; supported are 'gptq' and "
                "'gptq_v2', which GPTQModel writes"
            )
        return cls(
            bits=bits,
            group_size=group_size,
            symmetric=bool(config.get("sym", False)),
            zero_shift=1 if layout == "gptq" else 0,
            reordered=bool(config.get("desc_act", False)),
        )

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers; see `QuantizationMethod`."""
        words, n = module.info("qweight", ("I32",)).shape
        k = words * 32 // self.bits
        if words * 32 % self.bits or n * self.bits % 32:
            raise module.error(
                "qweight",
                f"of shape {[words, n]} does not hold whole columns of {self.bits}-bit codes for a "
                "multiple of 32 bits of outputs",
            )
        group_size, groups = group_layout(k, self.group_size)
        module.info("qzeros", ("I32",), (groups, n * self.bits // 32))
        scales = module.info("scales", scale_types(self.symmetric), (groups, n))
        if module.has("g_idx") or self.reordered:
            module.info("g_idx", ("I32", "I64"), (k,))
        dtype = DTYPES[scales.dtype]
        return GridSpec(
            shape=(n, k),
            bits=self.bits,
            group_size=group_size,
            scales=dtype,
            offsets=None if self.symmetric else zero_point_form(self.bits, dtype),
            reordered=self.reordered and groups > 1,
        )

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer; see `QuantizationMethod`."""
        spec = self.check(module)
        codes = unpack_words(module.read("qweight").T, self.bits)
        zeros = unpack_words(module.read("qzeros"), self.bits).T
        zeros = (zeros + np.uint8(self.zero_shift)) & np.uint8(2**self.bits - 1)
        columns = read_columns(module, "g_idx", groups=zeros.shape[1], group_size=spec.group_size)
        middle = 2 ** (self.bits - 1)
        if self.symmetric and (zeros != middle).any():
            raise module.error(
                "qzeros",
                f"has zero points from {np.min(zeros)} to {np.max(zeros)}, but they are {middle} "
                "where quantization_config says 'sym': true; set its checkpoint_format to "
                f"'gptq_v2' if all are {middle + 1}, its sym to false if they differ",
            )
        return integer_blocks(
            codes,
            middle if self.symmetric else zeros,
            module.read("scales").T,
            bits=self.bits,
            group_size=spec.group_size,
            columns=columns,
        )
