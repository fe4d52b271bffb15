"""GGUF files: tensors dequantised, or as codes on their exact grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec
from lutjax.io.gguf_blocks import BLOCK_TYPES
from lutjax.io.gguf_format import gguf_package, read_header
from lutjax.io.readers import TensorInfo, TensorReader, read_bytes


class GGUFReader(TensorReader):
    """The tensors and metadata of one GGUF file."""

    def __init__(self, path: str | Path) -> None:
        """Reads the header.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the file is not sound, or a tensor's type cannot be dequantised.
        """
        self.path = Path(path)
        self.metadata, infos = read_header(path)
        for name, info in infos.items():
            _check_type(name, info)
        self._factors = {
            name: _check_factor(infos, name)
            for name, info in infos.items()
            if info.dtype in BLOCK_TYPES and _beside(name, "scale") in infos
        }
        unused = {_beside(name, suffix) for name in self._factors for suffix in _FACTORS}
        self.infos = {name: info for name, info in infos.items() if name not in unused}

    def dtype(self, name: str) -> np.dtype:
        """That of whatever is dequantised: float32."""
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32.

        Raises:
          KeyError: if there is no such tensor.
        """
        info = self.infos[name]
        if info.dtype in BLOCK_TYPES:
            return self.read_grid(name).dense()
        return _dequantize(read_bytes(info), info)

    def grid_spec(self, name: str) -> GridSpec | None:
        """What the header says of a weight of one of `BLOCK_TYPES`; None for any other tensor.

        Raises:
          KeyError: if there is no such tensor.
        """
        info = self.infos[name]
        if info.dtype not in BLOCK_TYPES or len(info.shape) < 2:
            return None
        return BLOCK_TYPES[info.dtype].spec(info.shape)

    def read_grid(self, name: str) -> GridBlocks:
        """Reads a weight of one of `BLOCK_TYPES` as codes, scales and offsets.

        Raises:
          KeyError: if there is no such tensor, or it is of another type.
        """
        info = self.infos[name]
        gguf = gguf_package()
        _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[info.dtype]]
        grid = BLOCK_TYPES[info.dtype].blocks(read_bytes(info), info.shape, block_bytes)
        if name not in self._factors:
            return grid
        factors = read_bytes(self._factors[name]).view("<f4").reshape(-1, 1)
        levels = grid.levels * (factors if factors.size > 1 else factors[0])
        return dataclasses.replace(grid, levels=levels)


# Beside a weight: what its values are multiplied by, one number or one an expert (converted NVFP4
# checkpoints have it), and what was measured to round activations, which are not rounded here.
_FACTORS = ("scale", "input_scale")


def _beside(weight: str, suffix: str) -> str:
    return f"{weight.removesuffix('.weight')}.{suffix}"


def _check_factor(infos: Mapping[str, TensorInfo], weight: str) -> TensorInfo:
    name = _beside(weight, "scale")
    info, experts = infos[name], infos[weight].shape[:-2]
    if info.dtype != "F32" or info.shape not in ((1,), experts):
        raise ValueError(
            f"{info.path}: tensor {name!r} of type {info.dtype} and shape {list(info.shape)} must "
            f"be of F32 and have shape [1]{f' or {list(experts)}' if experts else ''}"
        )
    return info


def _dequantize(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[info.dtype]
    rows = data.reshape(*info.shape[:-1], -1)
    return gguf.dequantize(rows, kind).astype(np.float32, copy=False).reshape(info.shape)


def _check_type(name: str, info: TensorInfo) -> None:
    """Dequantises one block of zeros, so that an unsupported type is seen before any reading."""
    if info.dtype in BLOCK_TYPES:
        return
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[info.dtype]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{info.path}: tensor {name!r} has the type {info.dtype}, which the gguf package "
            "cannot dequantise"
        ) from error
