"""Named tensors on disk: shapes known up front, values read one at a time."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lutjax.io.blocks import GridBlocks, GridSpec


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor.

    Attributes:
      shape: the logical shape, outermost axis first.
      dtype: the file format's own name of the type, e.g. `"BF16"` or `"Q4_1"`.
      path: the file that holds the tensor.
      offset: where its bytes begin, from the start of that file.
      nbytes: how many bytes it takes there.
    """

    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    nbytes: int


class TensorReader(abc.ABC):
    """A checkpoint's tensors; opening one reads headers only.

    Attributes:
      infos: all tensors by name, in file order.
    """

    infos: Mapping[str, TensorInfo]

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The dtype in which `read` gives a tensor.

        Raises:
          KeyError: if there is no such tensor.
        """

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as an array of a floating-point dtype.

        Raises:
          KeyError: if there is no such tensor.
        """

    def stored_name(self, name: str) -> str:
        """The tensor of the files that a tensor is read from, or the first of several."""
        return name

    def grid_spec(self, name: str) -> GridSpec | None:
        """What the headers say of a weight that is stored as codes; None for any other tensor."""
        return None

    def read_grid(self, name: str) -> GridBlocks:
        """Reads a weight that is stored as codes as codes, scales and offsets.

        Raises:
          KeyError: if there is no such weight.
        """
        raise KeyError(name)

    def is_zero_bias(self, name: str) -> bool:
        """Whether a tensor is a quantised layer's bias of zeros, which some tools always write."""
        return False


def read_bytes(info: TensorInfo) -> np.ndarray:
    """Reads a tensor's bytes.

    Args:
      info: where they are.

    Returns:
      uint8 `[nbytes]`.

    Raises:
      ValueError: if the file has become shorter than its header says.
    """
    data = np.fromfile(info.path, np.uint8, count=info.nbytes, offset=info.offset)
    if data.size != info.nbytes:
        raise ValueError(
            f"{info.path} ends {info.nbytes - data.size} bytes too early; it is truncated"
        )
    return data


def existing_file(path: str | Path) -> Path:
    """Returns `path` if it is a file.

    Raises:
      FileNotFoundError: if nothing is there.
      ValueError: if something else is there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path
