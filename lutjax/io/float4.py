"""Layers of four-bit floats: NVFP4 and MXFP4."""

from __future__ import annotations

import dataclasses

import numpy as np

from lutjax.codebooks import float_e2m1
from lutjax.io.blocks import GridBlocks, GridSpec, powers_of_two, unpack_words
from lutjax.io.quantized_module import BFLOAT16, EXPONENTS, UNUSED_PARTS, QuantizedModule

E2M1_LEVELS = float_e2m1(4) * np.float32(6)
"""The values of the sixteen codes, float32 `[16]`; the highest bit is the sign."""


@dataclasses.dataclass(frozen=True)
class Float4:
    """Weights E2M1[code] · scale · factor.

    Codes uint8 `[out, in / 2]`, the first of two in the low half, and `weight_scale`: in NVFP4
    float8 (E4M3) for groups of 16, and one float32 factor for the matrix; in MXFP4 uint8 (E8M0)
    for groups of 32, and no factor. The factor becomes part of the table, so scales are kept as
    bfloat16 without loss; E2M1 · (scale · factor) rounds otherwise in the last bit of float32.

    Attributes:
      codes: the suffix of the codes.
      group_size: codes that share a scale.
      factor: the suffix of the factor; None for MXFP4.
      divides: whether it is the factor's inverse that is stored.

    Source: OCP Microscaling Formats (MX) 1.0; NVFP4 (arXiv 2509.25149, section 2).
    """

    codes: str
    group_size: int
    factor: str | None = None
    divides: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """See `QuantizationMethod`."""
        factor = () if self.factor is None else (self.factor,)
        return (self.codes, "weight_scale", *factor, *UNUSED_PARTS)

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers; see `QuantizationMethod`."""
        n, half = module.info(self.codes, ("U8",)).shape
        k = 2 * half
        types = EXPONENTS if self.factor is None else ("F8_E4M3",)
        module.info("weight_scale", types, (n, -(-k // self.group_size)))
        if self.factor is not None:
            module.info(self.factor, ("F32",), (), (1,))
        return GridSpec((n, k), 4, min(self.group_size, k), BFLOAT16, None)

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer; see `QuantizationMethod`."""
        spec = self.check(module)
        codes = unpack_words(module.read(self.codes), 4)
        scales, levels = module.read("weight_scale"), E2M1_LEVELS
        if self.factor is None:
            scales = powers_of_two(scales.view(np.uint8), 127)
            return GridBlocks(codes, levels, scales, None, spec.group_size)
        factor = module.read(self.factor).reshape(1)
        with np.errstate(all="ignore"):  # whoever asks for finite values looks at the result
            levels = levels / factor if self.divides else levels * factor
        return GridBlocks(codes, levels, scales.astype(BFLOAT16), None, spec.group_size)
