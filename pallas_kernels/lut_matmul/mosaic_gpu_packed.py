"""Prepacked weights of the Hopper kernel; a :class:`packed_weight.Layout`.

The layout is fragments of the padded K and N, for any configuration whose steps divide those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.layout import pack
from pallas_kernels.lut_matmul import mosaic_gpu
from pallas_kernels.lut_matmul.columns import take_columns
from pallas_kernels.lut_matmul.mosaic_gpu_layout import unpack_columns
from pallas_kernels.lut_matmul.packed_weight import PACKED_ROWS, PackedWeight


def reorder(weight: PackedWeight, *, device_kind: str | None, zero: int | None) -> PackedWeight:
    """Words in fragments and the table of bytes."""
    del device_kind, zero
    (words,) = weight.planes
    problem = mosaic_gpu.make_problem(
        PACKED_ROWS, words, k=weight.k, group_size=weight.group_size, p=weight.p
    )
    planes, scales, table = mosaic_gpu.prepack(
        words, weight.scales, weight.lut, problem, weight.dtype
    )
    padded = problem.padded_k, problem.padded_n
    return dataclasses.replace(weight, planes=planes, scales=scales, table=table, layout=padded)


def reason_against_transposed(weight: PackedWeight) -> str | None:
    """Groups that the transposed kernel does not have."""
    return mosaic_gpu.reason_against_transposed(weight.groups, weight.group_size)


def product(
    x: jax.Array, weight: PackedWeight, *, transpose: bool, out_dtype: Any, interpret: Any
) -> jax.Array:
    """``x @ W`` or ``x @ W.T`` in ``out_dtype``."""
    problem = _problem(x.shape[0], weight, transpose=transpose)
    y = mosaic_gpu.apply(x, _operands(weight), problem, out_dtype=out_dtype, interpret=interpret)
    return y[:, : weight.k if transpose else weight.n]


def product_grouped(
    x: jax.Array,
    weight: PackedWeight,
    groups: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any,
    interpret: Any,
) -> jax.Array:
    """``x[i] @ W[groups[i]]`` in ``out_dtype``."""
    y = mosaic_gpu.apply_grouped(
        x,
        _operands(weight),
        _problem(x.shape[1], weight, tiles=x.shape[0]),
        groups,
        sizes,
        out_dtype=out_dtype,
        interpret=interpret,
    )
    return y[..., : weight.n]


def canonical_columns(weight: PackedWeight, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Canonical words of some columns, and their scales."""
    codes = unpack_columns(weight.planes, weight.bits // weight.p, columns, weight.p)
    return pack(codes, weight.bits), take_columns(weight.scales, columns)


def _operands(weight: PackedWeight) -> tuple:
    return weight.planes, weight.scales, weight.table


def _problem(m: int, weight: PackedWeight, *, transpose: bool = False, tiles: int = 1) -> Any:
    return mosaic_gpu.make_problem(
        m,
        weight.words_like(),
        k=weight.k,
        group_size=weight.group_size,
        p=weight.p,
        padded=weight.layout,
        transpose=transpose,
        tiles=tiles,
    )
