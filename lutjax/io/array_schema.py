"""Compressed arrays as JSON plus named tensors: classes by name, static fields by value.

A leaf is described by a JSON value in which `{"tensor": name}` stands for an array,
`{"class": name, "fields": {...}}` for an object of a class in `CLASSES`, `{"dtype": name}` for a
dtype, a list for a tuple, and anything else for itself. Nothing is unpickled, and a class that is
not in the table cannot be named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import (
    ConcatArray,
    DenseArray,
    GatedArray,
    LowRankArray,
    LutArray,
    MatrixView,
    ProductArray,
    QuantizedScales,
    ReorderedArray,
    RotatedArray,
    SumArray,
)
from lutjax.io.safetensors import DTYPES

CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        ConcatArray,
        DenseArray,
        GatedArray,
        LowRankArray,
        LutArray,
        MatrixView,
        ProductArray,
        QuantizedScales,
        ReorderedArray,
        RotatedArray,
        SumArray,
    )
}
"""What can be stored; a new kind of array is one entry here."""

_DTYPE_NAMES = {dtype.name for dtype in DTYPES.values()}


def describe(leaf: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Splits a leaf into a JSON value and its tensors.

    Args:
      leaf: an array, a compressed array, or either with `jax.ShapeDtypeStruct` for arrays.
      name: the name of the leaf; its tensors are called `name` or `name.field`.

    Returns:
      The description, and the tensors by name, in the order of the fields.

    Raises:
      TypeError: if it holds something that has no form on disk.

    >>> describe(np.zeros(3), "norm/scale")[0]
    {'tensor': 'norm/scale'}
    """
    if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return {"tensor": name}, {name: leaf}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return leaf, {}
    if isinstance(leaf, np.dtype):
        return {"dtype": leaf.name}, {}
    tensors: dict[str, Any] = {}

    def part(value: Any, label: str) -> Any:
        description, found = describe(value, f"{name}.{label}")
        tensors.update(found)
        return description

    if isinstance(leaf, tuple):
        return [part(item, str(i)) for i, item in enumerate(leaf)], tensors
    if dataclasses.is_dataclass(leaf) and CLASSES.get(type(leaf).__name__) is type(leaf):
        fields = {
            field.name: part(getattr(leaf, field.name), field.name)
            for field in dataclasses.fields(leaf)
        }
        return {"class": type(leaf).__name__, "fields": fields}, tensors
    raise TypeError(
        f"{name!r} is a {type(leaf).__name__}, which cannot be saved; use arrays or one of "
        f"{', '.join(CLASSES)} (of adapters: merge them, or save what lora.detach takes off)"
    )


def restore(description: Any, read: Callable[[str], Any]) -> Any:
    """The inverse of `describe`.

    Args:
      description: a JSON value.
      read: gives the tensor of a name.

    Returns:
      The leaf.

    Raises:
      ValueError: if the description names an unknown class, dtype or field.
      KeyError: if `read` knows no such tensor.

    >>> restore({"class": "MatrixView", "fields": {"k": [-1], "n": [-1], "order": [1, 0]}}, dict)
    MatrixView(k=(-1,), n=(-1,), order=(1, 0))
    """
    if isinstance(description, list):
        return tuple(restore(item, read) for item in description)
    if not isinstance(description, dict):
        return description
    match description:
        case {"tensor": str(name)}:
            return read(name)
        case {"dtype": str(name)} if name in _DTYPE_NAMES:
            return jnp.dtype(name)
        case {"class": str(name), "fields": dict(fields)} if name in CLASSES:
            values = {field: restore(value, read) for field, value in fields.items()}
            if name == "QuantizedScales" and isinstance(values.get("block"), int):
                raise ValueError("quantised scales of an older layout; quantise the weights again")
            try:
                return CLASSES[name](**values)
            except TypeError as error:
                raise ValueError(f"a {name} cannot have the fields {list(fields)}") from error
    raise ValueError(f"unknown description {str(description)[:200]}")
