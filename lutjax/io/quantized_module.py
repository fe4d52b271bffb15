"""The tensors of one quantised layer in safetensors files."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import ml_dtypes
import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec
from lutjax.io.readers import TensorInfo
from lutjax.io.safetensors import SafetensorsReader

HALF_TYPES = ("F16", "BF16")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
"""Has every value of E4M3, and every power of two that E8M0 has."""

EXPONENTS = ("U8", "F8_E8M0")
"""What exponents of powers of two may be stored in."""

UNUSED_PARTS = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "activation_scale",
    "output_scale",
)
"""Suffixes of what was measured to round activations, which are not rounded here."""


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """A layer whose weight is spread over several tensors.

    Attributes:
      reader: all tensors of the checkpoint.
      name: what the names of its tensors begin with, e.g. `model.layers.0.mlp.up_proj`.
    """

    reader: SafetensorsReader
    name: str

    def has(self, suffix: str) -> bool:
        """Whether the layer has a tensor `name.suffix`."""
        return f"{self.name}.{suffix}" in self.reader.infos

    def info(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorInfo:
        """The header of `name.suffix`.

        Args:
          suffix: which tensor.
          dtypes: what its dtype may be.
          *shapes: what its shape may be; any matrix if none is given.

        Raises:
          ValueError: if it is missing, or of another dtype or shape.
        """
        if not self.has(suffix):
            raise self.error(suffix, "is missing")
        info = self.reader.infos[f"{self.name}.{suffix}"]
        if info.dtype not in dtypes:
            raise self.error(suffix, f"has dtype {info.dtype}; it must be {' or '.join(dtypes)}")
        if not shapes and (len(info.shape) != 2 or 0 in info.shape):
            raise self.error(suffix, f"has shape {list(info.shape)}; it must be a matrix")
        if shapes and info.shape not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(suffix, f"has shape {list(info.shape)}; it must be {allowed}")
        return info

    def read(self, suffix: str) -> np.ndarray:
        """Reads `name.suffix` in its stored dtype."""
        return self.reader.read(f"{self.name}.{suffix}")

    def error(self, suffix: str, problem: str) -> ValueError:
        """An error about `name.suffix`."""
        directory = next(iter(self.reader.infos.values())).path.parent
        return ValueError(f"{directory}: tensor '{self.name}.{suffix}' {problem}")


class QuantizationMethod(Protocol):
    """How the layers of one kind of quantised checkpoint are stored."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Suffixes of a layer's tensors, that of the packed codes first."""
        ...

    def check(self, module: QuantizedModule) -> GridSpec:
        """Checks a layer's headers.

        Raises:
          ValueError: naming the tensor that is missing or does not fit the others.
        """
        ...

    def read(self, module: QuantizedModule) -> GridBlocks:
        """Reads a layer whose headers were checked.

        Raises:
          ValueError: naming the tensor whose values are not sound.
        """
        ...


def scale_types(symmetric: bool) -> tuple[str, ...]:
    """What scales may be stored in; offsets are exact for two bytes only, see `integer_blocks`."""
    return (*HALF_TYPES, "F32") if symmetric else HALF_TYPES


def group_layout(k: int, group_size: int) -> tuple[int, int]:
    """The inputs that share a scale, and how many groups there are.

    Args:
      k: inputs of the layer.
      group_size: as the configuration has it; -1 for all inputs.

    >>> group_layout(96, 64), group_layout(96, -1)
    ((64, 2), (96, 1))
    """
    size = k if group_size == -1 else min(group_size, k)
    return size, -(-k // size)


def read_columns(
    module: QuantizedModule, suffix: str, *, groups: int, group_size: int
) -> np.ndarray | None:
    """Reads which group each column is in, and sorts the columns by it.

    Args:
      module: the layer.
      suffix: its tensor of group indices, integers `[in]`, if it has one.
      groups: how many groups there are.
      group_size: columns in a group; the last group may be smaller.

    Returns:
      The columns' order, in which each group's are neighbours; None if they are so already
      or the layer has no such tensor.

    Raises:
      ValueError: if an index is out of range or a group has another size.
    """
    if not module.has(suffix):
        return None
    index = module.read(suffix)
    if index.min() < 0 or index.max() >= groups:
        raise module.error(
            suffix,
            f"has group indices from {index.min()} to {index.max()}, but there are {groups} groups",
        )
    order = np.argsort(index, kind="stable")
    places = np.arange(index.size)
    if not np.array_equal(index[order], places // group_size):
        raise module.error(suffix, f"does not divide the columns into groups of {group_size}")
    return None if np.array_equal(order, places) else order
