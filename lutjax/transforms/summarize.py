"""What a parameter pytree holds and what it takes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np

from lutjax.arrays import format_bytes, is_compressed
from lutjax.paths import named_leaves


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """One parameter: its path, logical shape, bytes, and how it is stored."""

    path: str
    shape: tuple[int, ...]
    nbytes: int
    kind: str
    compressed: bool

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return 8 * self.nbytes / max(self.size, 1)


@dataclasses.dataclass(frozen=True)
class Summary:
    """All parameters; prints as a table."""

    leaves: tuple[LeafSummary, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def compressed(self) -> Summary:
        """The compressed parameters alone."""
        return Summary(tuple(leaf for leaf in self.leaves if leaf.compressed))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights; 0 if there are none."""
        return 8 * self.nbytes / max(self.size, 1)

    def to_json(self) -> str:
        """The table as JSON."""
        rows = [
            dataclasses.asdict(leaf) | {"bits_per_weight": leaf.bits_per_weight}
            for leaf in self.leaves
        ]
        total = {
            "size": self.size,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "compressed_bits_per_weight": self.compressed.bits_per_weight,
        }
        return json.dumps({"parameters": rows, "total": total}, indent=2)

    def __str__(self) -> str:
        """A table with a line for each parameter and totals."""
        width = max([len(leaf.path) for leaf in self.leaves] + [len("parameter")])
        lines = [
            f"{'parameter':<{width}}  {'shape':<18}  {'bits/weight':>11}  {'size':>9}  stored as"
        ]
        lines += [
            f"{leaf.path:<{width}}  {'x'.join(map(str, leaf.shape)):<18}  "
            f"{leaf.bits_per_weight:>11.3f}  {format_bytes(leaf.nbytes):>9}  {leaf.kind}"
            for leaf in self.leaves
        ]
        for name, part in (("compressed", self.compressed), ("total", self)):
            lines.append(
                f"{name:<{width}}  {part.size:<18,}  {part.bits_per_weight:>11.3f}  "
                f"{format_bytes(part.nbytes):>9}"
            )
        return "\n".join(lines)


def summarize(params: Any) -> Summary:
    """Lists every parameter with its shape, bits a weight and bytes.

    Args:
      params: A pytree of arrays, compressed arrays or ``jax.ShapeDtypeStruct``. Random keys,
        functions and the None of :func:`lutjax.partition` are left out.

    >>> import jax.numpy as jnp, lutjax
    >>> params = lutjax.quantize({"kernel": jnp.eye(32)}, bits=4, group_size=32)
    >>> summarize(params).nbytes
    640
    """
    return Summary(tuple(_leaf(p, leaf) for p, leaf in named_leaves(params) if _counts(leaf)))


def _counts(leaf: Any) -> bool:
    """Whether it is an array; modules also hold functions, and states hold keys."""
    if is_compressed(leaf) or isinstance(leaf, bool | int | float | complex):
        return True
    return hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype)


def _leaf(path: str, leaf: Any) -> LeafSummary:
    if is_compressed(leaf):
        kind = re.sub(r"shape=\([\d, ]*\), ", "", repr(leaf))  # it has a column of its own
        return LeafSummary(path, leaf.shape, leaf.nbytes, kind, compressed=True)
    shape = tuple(np.shape(leaf))
    dtype = np.dtype(leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf))
    nbytes = math.prod(shape) * dtype.itemsize
    return LeafSummary(path, shape, nbytes, str(dtype), compressed=False)
