"""Lazy reading of safetensors files, single or sharded with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lutjax.io.readers import TensorInfo, TensorReader, existing_file, read_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The same bound as the safetensors library's.
_MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""What a dense weight may be stored in."""


class SafetensorsReader(TensorReader):
    """The tensors of one or several safetensors files."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        """Wraps tensors whose headers were read; see `open_file` and `open_directory`."""
        self.infos = infos

    @classmethod
    def open_file(cls, path: str | Path) -> SafetensorsReader:
        """Reads the header of one file.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the header is not sound or the file is truncated.
        """
        return cls(_read_header(existing_file(path)))

    @classmethod
    def open_directory(cls, directory: str | Path) -> SafetensorsReader:
        """Reads the headers of `model.safetensors`, or else of the shards that the index lists.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if a header or the index is not sound.
        """
        directory = Path(directory)
        index = directory / INDEX_NAME
        weight_map = read_index(directory)
        if weight_map is None:
            return cls.open_file(directory / SINGLE_NAME)
        infos: dict[str, TensorInfo] = {}
        for shard in dict.fromkeys(weight_map.values()):
            if not (directory / shard).is_file():
                raise FileNotFoundError(f"{index} names the shard {shard}, which is missing")
            infos |= _read_header(directory / shard)
        for name, shard in weight_map.items():
            if name not in infos or infos[name].path.name != shard:
                raise ValueError(f"{index} says that {shard} holds {name!r}, but it does not")
        return cls(infos)

    def below(self, prefix: str) -> SafetensorsReader:
        """The tensors whose names begin with `prefix`, which is taken off."""
        return SafetensorsReader(
            {
                name.removeprefix(prefix): info
                for name, info in self.infos.items()
                if name.startswith(prefix)
            }
        )

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which a tensor is stored.

        Raises:
          KeyError: if there is no such tensor.
        """
        return DTYPES[self.infos[name].dtype]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its stored dtype.

        Raises:
          KeyError: if there is no such tensor.
        """
        info = self.infos[name]
        return read_bytes(info).view(self.dtype(name)).reshape(info.shape)

    def read_part(self, name: str, index: Any) -> np.ndarray:
        """A contiguous copy of a part of a tensor; of the rest, nothing is held.

        Raises:
          KeyError: if there is no such tensor.
        """
        info = self.infos[name]
        whole = np.memmap(info.path, np.uint8, mode="r", offset=info.offset, shape=(info.nbytes,))
        return np.array(whole.view(self.dtype(name)).reshape(info.shape)[index], order="C")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it does not hold a JSON object.
    """
    try:
        value = json.loads(existing_file(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def read_index(directory: Path) -> dict[str, str] | None:
    """Reads which file of a directory has which tensor; None if all are in `model.safetensors`.

    An index beside the single file is an older one, and transformers leaves it out as well.

    Raises:
      ValueError: if the index is not sound.
    """
    path = directory / INDEX_NAME
    if (directory / SINGLE_NAME).is_file() or not path.is_file():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no 'weight_map'")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} names the shard {shard!r}, which is not a file name")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise ValueError(f"{path} has {size} bytes; it is not a safetensors file")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} claims a header of {length} bytes in a file of {size}; it is truncated "
                "or not a safetensors file"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    return {name: _tensor_info(path, name, entry, start, size) for name, entry in header.items()}


def _tensor_info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes tensor {name!r} as {entry!r}") from error
    if dtype not in DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} has the unsupported dtype {dtype!r}; supported are "
            f"{', '.join(DTYPES)}"
        )
    integers = isinstance(shape, list) and all(
        isinstance(value, int) and value >= 0 for value in (*shape, begin, end)
    )
    if not integers or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {shape} does not fit its "
            f"data_offsets [{begin}, {end}]"
        )
    if start + end > size:
        raise ValueError(
            f"{path} has {size} bytes, but tensor {name!r} ends at {start + end}; it is truncated"
        )
    return TensorInfo(tuple(shape), dtype, path, start + begin, end - begin)
