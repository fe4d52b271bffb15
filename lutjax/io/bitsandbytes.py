"""Layers quantised to four bits by bitsandbytes (QLoRA)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec
from lutjax.io.quantized_module import QuantizedModule

BITS = 4
KINDS = ("nf4", "fp4")

_STATE = "weight.quant_state.bitsandbytes__"


@dataclasses.dataclass(frozen=True)
class BitsAndBytes:
    """Weights table[code] · scale in blocks of the flattened matrix.

    `weight` uint8, two codes a byte, the first in the high nibble; `weight.quant_map` float32
    `[16]`; `weight.absmax`, a float32 scale for each block, or a uint8 code for it: then it is
    `nested_quant_map[code] * nested_absmax + nested_offset`, with one `nested_absmax` for each 256
    blocks. A JSON object in `weight.quant_state.bitsandbytes__nf4` (or fp4) has the sizes.

    Scales are expanded to float32 for each group of a row; a block that does not divide the rows
    becomes groups of the largest common divisor.

    Source: QLoRA (arXiv 2305.14314); https://github.com/bitsandbytes-foundation/bitsandbytes.
    """

    parts = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *(_STATE + kind for kind in KINDS),
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> BitsAndBytes:
        """Reads the `quantization_config` of a config.json.

        Raises:
          ValueError: if it is not of four bits.
        """
        if not config.get("load_in_4bit"):
            raise ValueError(
                f"{source}: bitsandbytes without load_in_4bit; supported are its 4-bit weights"
            )
        storage = config.get("bnb_4bit_quant_storage") or "uint8"
        if storage != "uint8":
            raise ValueError(
                f"{source}: bitsandbytes with bnb_4bit_quant_storage={storage!r}; supported is "
                "'uint8'"
            )
        return cls()

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers and its JSON object; see `QuantizationMethod`."""
        state = _State.read(module)
        n, k = state.shape
        blocks = -(-n * k // state.block)
        module.info("weight", ("U8",), (-(-n * k // 2), 1))
        module.info("weight.quant_map", ("F32",), (2**BITS,))
        if state.nested_block is None:
            module.info("weight.absmax", ("F32",), (blocks,))
        else:
            module.info("weight.absmax", ("U8",), (blocks,))
            module.info("weight.nested_absmax", ("F32",), (-(-blocks // state.nested_block),))
            module.info("weight.nested_quant_map", ("F32",), (256,))
        return GridSpec((n, k), BITS, math.gcd(k, state.block), np.dtype(np.float32), None)

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer; see `QuantizationMethod`."""
        spec, state = self.check(module), _State.read(module)
        n, k = spec.shape
        packed = module.read("weight")
        codes = np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1)[: n * k]
        scales = module.read("weight.absmax")
        if state.nested_block is not None:
            steps = np.repeat(module.read("weight.nested_absmax"), state.nested_block)
            values = module.read("weight.nested_quant_map")[scales]
            scales = values * steps[: scales.size] + np.float32(state.nested_offset)
        scales = np.repeat(scales, state.block // spec.group_size)[: n * k // spec.group_size]
        return GridBlocks(
            codes=codes.reshape(n, k),
            levels=module.read("weight.quant_map"),
            scales=scales.reshape(n, -1),
            offsets=None,
            group_size=spec.group_size,
        )


@dataclasses.dataclass(frozen=True)
class _State:
    """The JSON object of a layer.

    Attributes:
      shape: `(out, in)`.
      block: codes that share a scale.
      nested_block: scales that share a step; None if they are not quantised.
      nested_offset: what is added to the scales.
    """

    shape: tuple[int, int]
    block: int
    nested_block: int | None
    nested_offset: float

    @classmethod
    def read(cls, module: QuantizedModule) -> _State:
        kind = next((kind for kind in KINDS if module.has(_STATE + kind)), KINDS[0])
        suffix = _STATE + kind
        if not module.has(suffix):
            raise module.error(suffix, "is missing")
        try:
            data = json.loads(module.read(suffix).tobytes())
            rows, columns = data["shape"]
            nested = "nested_blocksize" in data
            state = cls(
                shape=(rows, columns),
                block=data["blocksize"],
                nested_block=data["nested_blocksize"] if nested else None,
                nested_offset=float(data["nested_offset"]) if nested else 0.0,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise module.error(suffix, f"does not describe a matrix: {error!r}") from error
        sizes = (rows, columns, state.block, state.nested_block if nested else 1)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise module.error(suffix, f"has sizes {sizes}; they must be positive integers")
        return state
