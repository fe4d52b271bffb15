"""GGUF files: tensors dequantised, or as codes on their exact grids."""

from __future__ import annotations

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
        self.metadata, self.infos = read_header(path)
        for name, info in self.infos.items():
            _check_type(name, info)

    def dtype(self, name: str) -> np.dtype:
        """That of whatever is dequantised: float32."""
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32.

        Raises:
          KeyError: if there is no such tensor.
        """
        info = self.infos[name]
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
        return _grid(read_bytes(info), info)


def _grid(data: np.ndarray, info: TensorInfo) -> GridBlocks:
    gguf = gguf_package()
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[info.dtype]]
    return BLOCK_TYPES[info.dtype].blocks(data, info.shape, block_bytes)


def _dequantize(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    if info.dtype in BLOCK_TYPES:
        return _grid(data, info).dense()
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
