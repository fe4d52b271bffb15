"""GGUF files: tensors dequantised, or as codes on their exact grids."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from lutjax.io.gguf_format import gguf_package, read_header
from lutjax.io.readers import TensorInfo, read_bytes

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class GridBlocks:
    """A matrix on a uniform grid per block: levels[codes] · scales (+ offsets).

    The product in float32, with the block's scale and offset repeated over its 32 values, is
    bit for bit what dequantisation gives.

    Attributes:
      codes: uint8 `[out, in]`.
      levels: float32 `[2 ** bits]`, the value of each code.
      scales: float32 `[out, in / 32]`; each is exact in float16.
      offsets: float32 `[out, in / 32]`, exact in float16, or None.
    """

    codes: UInt8[np.ndarray, "out in"]
    levels: Float32[np.ndarray, " levels"]
    scales: Float32[np.ndarray, "out groups"]
    offsets: Float32[np.ndarray, "out groups"] | None


class GGUFReader:
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

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32.

        Raises:
          KeyError: if there is no such tensor.
        """
        info = self.infos[name]
        return _dequantize(read_bytes(info), info)

    def read_grid(self, name: str) -> GridBlocks:
        """Reads a matrix of type Q4_0, Q4_1 or Q8_0 as codes, scales and offsets.

        Raises:
          KeyError: if there is no such tensor.
          ValueError: if the tensor is of another type or is not a matrix.
        """
        info = self.infos[name]
        if info.dtype not in GRID_BITS or len(info.shape) != 2:
            raise ValueError(
                f"{self.path}: tensor {name!r} of type {info.dtype} and shape {info.shape} has no "
                f"uniform grid; only matrices of {', '.join(GRID_BITS)} have"
            )
        rows, columns = info.shape
        blocks = read_bytes(info).reshape(rows, columns // BLOCK, -1)
        scales = _float16(blocks[..., 0:2])
        if info.dtype == "Q8_0":
            levels = np.arange(-128, 128, dtype=np.float32)
            codes = blocks[..., 2:] + np.uint8(128)  # two's complement to 0 … 255, by wrapping
            return GridBlocks(codes.reshape(rows, columns), levels, scales, None)
        affine = info.dtype == "Q4_1"
        packed = blocks[..., 4 if affine else 2 :]
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(rows, columns)
        levels = np.arange(16, dtype=np.float32) - (0 if affine else 8)
        offsets = _float16(blocks[..., 2:4]) if affine else None
        return GridBlocks(codes, levels, scales, offsets)


GRID_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Types whose values lie on a uniform grid per block, with their bits a code."""


def _float16(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)


def _dequantize(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[info.dtype]
    rows = data.reshape(*info.shape[:-1], -1)
    return gguf.dequantize(rows, kind).astype(np.float32, copy=False).reshape(info.shape)


def _check_type(name: str, info: TensorInfo) -> None:
    """Dequantises one block of zeros, so that an unsupported type is seen before any reading."""
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
