"""Several weights that are multiplied with the same activations, as one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays.base import CompressedArray
from lutjax.arrays.concat_array import ConcatArray
from lutjax.arrays.dense_array import DenseArray
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.rotated import RotatedArray
from lutjax.arrays.scales import QuantizedScales
from lutjax.arrays.sum_array import SumArray
from lutjax.arrays.view import MATRIX

A = TypeVar("A", bound=CompressedArray)


def side_by_side(*weights: CompressedArray | Float[Array, "*batch k n"]) -> Any:
    """``[W1 W2 ...]``: one product instead of several where the weights are stored alike.

    The data of dense weights are joined, and of lookup-table weights with the same tables and sizes
    of groups, be they rotated or the parts of sums. Whatever else there is, such as low-rank parts
    or scales above a floor of their matrix, stays apart in a :class:`ConcatArray`, which multiplies
    by each.

    Args:
      *weights: Weights ``[*batch, K, N_i]``, outside ``jax.jit``: tables are compared.

    Returns:
      A weight ``[*batch, K, sum(N_i)]``; a ``jax.Array`` if all are.

    Raises:
      ValueError: If K, batch axes or dtypes of compressed weights differ, or one is a view of
        another shape, such as a transposed one.
      TypeError: If a lookup table is traced.

    >>> import lutjax
    >>> weight = lutjax.quantize(jnp.eye(64), bits=4, group_size=32)
    >>> side_by_side(weight, weight)
    LutArray(shape=(64, 128), float32, 4 bits, group_size=32, 4.7 kB)
    """
    dense = [weight for weight in weights if not isinstance(weight, CompressedArray)]
    if len(dense) == len(weights):
        return jnp.concatenate(dense, axis=-1)
    return _joined(
        [
            weight
            if isinstance(weight, CompressedArray)
            else DenseArray.of(weight, batch_ndim=weight.ndim - 2)
            for weight in weights
        ]
    )


def _joined(parts: Sequence[CompressedArray]) -> CompressedArray:
    apart = ConcatArray.of(*parts, axis="n")  # says what does not fit
    if apart.view != MATRIX:
        raise ValueError(f"{parts[0]!r} is not stored as [*batch, K, N]; its columns are no axis")
    if luts := _all(LutArray, parts):
        return _one_table(luts) if _are_alike(luts) else apart
    if dense := _all(DenseArray, parts):
        matrix = jnp.concatenate([part.matrix for part in dense], axis=-1)
        return dataclasses.replace(dense[0], matrix=matrix)
    rotated = _all(RotatedArray, parts)
    if len({part.block for part in rotated}) == 1:
        return RotatedArray.of(_joined([part.base for part in rotated]), rotated[0].block)
    sums = _all(SumArray, parts)
    if len({len(part.parts) for part in sums}) == 1:
        return SumArray.of(*map(_joined, zip(*(part.parts for part in sums), strict=True)))
    return apart


def _all(kind: type[A], parts: Sequence[CompressedArray]) -> list[A]:
    """The parts if all are of this kind, else none."""
    found = [part for part in parts if isinstance(part, kind)]
    return found if len(found) == len(parts) else []


def _are_alike(parts: Sequence[LutArray]) -> bool:
    """Whether one kernel can read them as one weight."""

    def layout(part: LutArray) -> tuple:
        forms = [_form(scales) for scales in (part.scales, part.offsets)]
        sizes = part.bits, part.vector_size, part.group_size, part.padding
        return *sizes, *forms, part.lut.shape[-3] == 1

    if len({layout(part) for part in parts}) > 1:
        return False
    try:
        first, *others = (np.asarray(part.lut) for part in parts)
    except jax.errors.TracerArrayConversionError as error:
        message = "lookup tables are compared to join weights; call this outside jax.jit"
        raise TypeError(message) from error
    return first.shape[-3] > 1 or all(np.array_equal(first, other) for other in others)


def _form(scales: Any) -> Any:
    """What scales that can be joined have in common."""
    if not isinstance(scales, QuantizedScales):
        return None if scales is None else scales.dtype
    # A floor is that of one matrix, and blocks of columns begin at its first one.
    if scales.floor is not None or scales.block[1] > 1:
        return object()  # like no other
    return scales.bits, scales.block, scales.zero, scales.steps.dtype


def _one_table(parts: Sequence[LutArray]) -> LutArray:
    first = parts[0]

    def join(field: str, axis: int = -1) -> Any:
        fields = [getattr(part, field) for part in parts]
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=axis), *fields)

    return dataclasses.replace(
        first,
        words=join("words"),
        scales=join("scales"),
        lut=first.lut if first.lut.shape[-3] == 1 else join("lut", axis=-3),
        offsets=join("offsets"),
    )
