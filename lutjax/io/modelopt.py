"""Layers quantised by NVIDIA's Model Optimizer: FP8 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lutjax.io.byte_weights import ByteWeights
from lutjax.io.float4 import Float4
from lutjax.io.quantized_module import QuantizationMethod

QUANT_METHOD = "modelopt"

CONFIG_NAME = "hf_quant_config.json"
"""A file beside config.json; older directories have it alone."""

_FLOAT8 = ByteWeights("F8_E4M3", ("weight_scale",))
_NVFP4 = Float4("weight", 16, "weight_scale_2")

ALGORITHMS: dict[str, QuantizationMethod] = {
    "FP8": _FLOAT8,
    "FP8_PER_CHANNEL_PER_TOKEN": _FLOAT8,
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
}
"""What can be read, by `quant_algo`."""


def from_config(config: Mapping[str, Any], source: str) -> QuantizationMethod:
    """Reads the `quantization_config` of a config.json.

    Raises:
      ValueError: if the algorithm is not supported.

    Source: https://github.com/NVIDIA/Model-Optimizer, "Unified HuggingFace Checkpoint".
    """
    algorithm = config.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ValueError(
            f"{source}: modelopt with quant_algo={algorithm!r}; supported are "
            f"{', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[algorithm]
