"""Safetensors with quantised layers, read as if each layer had one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lutjax.io import compressed_tensors, modelopt
from lutjax.io.awq import AWQ
from lutjax.io.bitsandbytes import BitsAndBytes
from lutjax.io.blocks import GridBlocks, GridSpec
from lutjax.io.byte_weights import ByteWeights
from lutjax.io.gptq import GPTQ
from lutjax.io.quantized_module import QuantizationMethod, QuantizedModule
from lutjax.io.readers import TensorInfo, TensorReader
from lutjax.io.safetensors import FLOAT_TYPES, SafetensorsReader

METHODS: dict[str, Callable[[Mapping[str, Any], str], QuantizationMethod]] = {
    "gptq": GPTQ.from_config,
    "awq": AWQ.from_config,
    "bitsandbytes": BitsAndBytes.from_config,
    "compressed-tensors": compressed_tensors.from_config,
    "fp8": ByteWeights.from_config,
    modelopt.QUANT_METHOD: modelopt.from_config,
}
"""What can be read, by `quant_method`; a new method is one entry here."""


def method_from_config(config: Any, source: str) -> QuantizationMethod:
    """The method that a config.json's `quantization_config` describes.

    Raises:
      ValueError: if the method or one of its options is not supported.
    """
    name = config.get("quant_method") if isinstance(config, dict) else config
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"{source} describes weights quantised by {name!r}; supported are {', '.join(METHODS)}"
        )
    return METHODS[name](config, source)


class QuantizedReader(TensorReader):
    """Tensors of which some are the quantised weights of layers.

    Layers that were left as they are have a plain `weight`, which stays so.
    """

    def __init__(self, reader: SafetensorsReader, method: QuantizationMethod) -> None:
        """Puts a layer's tensors together under the name of its weight.

        Args:
          reader: the tensors as they are stored.
          method: how layers are quantised.

        Raises:
          ValueError: naming a layer's tensor that is missing or does not fit the others.
        """
        self._reader = reader
        self._method = method
        codes = method.parts[0]
        names = [
            name.removesuffix(f".{codes}")
            for name, info in reader.infos.items()
            if name.endswith(f".{codes}") and info.dtype not in FLOAT_TYPES
        ]
        self._modules = {f"{name}.weight": QuantizedModule(reader, name) for name in names}
        self._specs = {name: method.check(module) for name, module in self._modules.items()}
        infos = dict(reader.infos)
        for name, module in self._modules.items():
            packed = infos[f"{module.name}.{codes}"]
            for part in method.parts:
                infos.pop(f"{module.name}.{part}", None)
            # Its place in the file stays that of the codes.
            infos[name] = dataclasses.replace(packed, shape=self._specs[name].shape)
        self.infos: Mapping[str, TensorInfo] = infos

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which `read` gives a tensor: the stored one, float32 if it is quantised.

        Raises:
          KeyError: if there is no such tensor.
        """
        return np.dtype(np.float32) if name in self._specs else self._reader.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32 if it is quantised.

        Raises:
          KeyError: if there is no such tensor.
          ValueError: if a layer's values are not sound.
        """
        if name in self._specs:
            return self.read_grid(name).dense()
        return self._reader.read(name)

    def grid_spec(self, name: str) -> GridSpec | None:
        """What the headers say of a quantised weight; None for any other tensor."""
        return self._specs.get(name)

    def read_grid(self, name: str) -> GridBlocks:
        """Reads a quantised weight as codes, scales and offsets.

        Raises:
          KeyError: if there is no such weight.
          ValueError: if the layer's values are not sound.
        """
        return self._method.read(self._modules[name])

    def is_zero_bias(self, name: str) -> bool:
        """Whether a tensor is a quantised layer's bias of zeros, which some tools always write."""
        weight = f"{name.removesuffix('.bias')}.weight"
        return name.endswith(".bias") and weight in self._specs and not self.read(name).any()
