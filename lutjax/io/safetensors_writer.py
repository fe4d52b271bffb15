"""Writing safetensors one tensor at a time, with the layout of all files fixed beforehand.

A safetensors file begins with a header that holds every tensor's offset. Shapes are known before
values here, so the header is written first and no tensor waits in memory for its neighbours.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np

from lutjax.io.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME

MAX_SHARD_BYTES = 5_000_000_000
"""Where the next file begins; a larger tensor gets a file of its own."""

_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def tensor_bytes(spec: jax.ShapeDtypeStruct) -> int:
    """Bytes of a tensor's values.

    >>> tensor_bytes(jax.ShapeDtypeStruct((2, 3), np.float32))
    24
    """
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


class SafetensorsWriter:
    """Writes `model.safetensors`, or shards with an index, tensor by tensor.

    >>> import tempfile
    >>> spec = jax.ShapeDtypeStruct((2,), np.float32)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with SafetensorsWriter(Path(directory), {"x": spec}) as writer:
    ...         writer.write("x", np.ones(2, np.float32))
    ...     sorted(file.name for file in Path(directory).iterdir())
    ['model.safetensors']
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, jax.ShapeDtypeStruct],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Plans the files.

        Args:
          directory: where to write; it exists.
          specs: shape and dtype of every tensor, in the order in which they will be written.
          max_shard_bytes: bytes of values in a file at most, if it holds several tensors.

        Raises:
          TypeError: if safetensors has no name for a dtype.
        """
        for name, spec in specs.items():
            if np.dtype(spec.dtype) not in _TYPE_NAMES:
                raise TypeError(f"{name!r} has the dtype {spec.dtype}, which safetensors lacks")
        self._directory = directory
        self._specs = specs
        shards = _split(specs, max_shard_bytes)
        count = len(shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._shards = dict(zip(names if count > 1 else [SINGLE_NAME], shards, strict=True))
        self._starts = {shard[0]: file for file, shard in self._shards.items() if shard}
        self._pending = iter(specs)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsWriter:
        """Starts writing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the last file; if all went well, writes the index."""
        self._close_file()
        if kind is not None:
            return
        missing = next(self._pending, None)
        if missing is not None:
            raise ValueError(f"tensor {missing!r} was announced but never written")
        if not self._specs:
            self._open_file(SINGLE_NAME)
            self._close_file()
        if len(self._shards) > 1:
            total = sum(map(tensor_bytes, self._specs.values()))
            weight_map = {name: file for file, shard in self._shards.items() for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / INDEX_NAME).write_text(text, encoding="utf-8")

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor.

        Raises:
          ValueError: if it is not the one announced next, or its shape or dtype differ.
        """
        expected = next(self._pending, None)
        if name != expected:
            raise ValueError(f"tensor {name!r} comes out of turn; {expected!r} is next")
        spec = self._specs[name]
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise ValueError(
                f"tensor {name!r} is {array.dtype}{list(array.shape)} but was announced as "
                f"{spec.dtype}{list(spec.shape)}"
            )
        if name in self._starts:
            self._close_file()
            self._open_file(self._starts[name])
        assert self._file is not None
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _open_file(self, file: str) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "flax"}}
        end = 0
        for name in self._shards[file]:
            spec = self._specs[name]
            begin, end = end, end + tensor_bytes(spec)
            header[name] = {
                "dtype": _TYPE_NAMES[np.dtype(spec.dtype)],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = (self._directory / file).open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _split(specs: Mapping[str, jax.ShapeDtypeStruct], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        nbytes = tensor_bytes(spec)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
