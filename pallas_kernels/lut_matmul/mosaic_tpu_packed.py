"""Prepacked weights of the TPU kernel; a :class:`packed_weight.Layout`.

The layout keeps the tiles of decoding for any number of rows of ``x``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.layout import pack
from pallas_kernels.lut_matmul import mosaic_tpu
from pallas_kernels.lut_matmul.columns import take_columns
from pallas_kernels.lut_matmul.equally_spaced import centred, step_of_line
from pallas_kernels.lut_matmul.mosaic_tpu_layout import COMPUTED, unpack_planes
from pallas_kernels.lut_matmul.packed_weight import PACKED_ROWS, PackedWeight


def reorder(weight: PackedWeight, *, device_kind: str | None, zero: int | None) -> PackedWeight:
    """The planes of the kernel, which computes equally spaced entries."""
    (words,) = weight.planes
    scales, lut, offsets = weight.scales, weight.lut, weight.offsets
    problem = mosaic_tpu.make_problem(
        jax.ShapeDtypeStruct((PACKED_ROWS, weight.k), weight.dtype),
        words,
        lut,
        k=weight.k,
        group_size=weight.group_size,
        transpose=False,
        device_kind=device_kind or platforms.device_kind("tpu"),
        computed=zero is not None,
    )
    if zero is not None and problem.config.lookup in COMPUTED:
        lut, offsets = centred(lut, scales, offsets, zero)
    planes, scales, table, _ = mosaic_tpu.prepack(words, scales, lut, problem=problem)
    return dataclasses.replace(
        weight,
        planes=planes,
        scales=scales,
        table=table,
        lut=lut,
        offsets=offsets,
        layout=problem.config,
    )


def reason_against_transposed(weight: PackedWeight) -> str | None:
    """None: the kernel transposes every weight that it takes."""
    del weight
    return None


def product(
    x: jax.Array, weight: PackedWeight, *, transpose: bool, out_dtype: Any, interpret: Any
) -> jax.Array:
    """``x @ W`` or ``x @ W.T`` in float32."""
    del out_dtype
    problem = _problem(x.shape[0], weight, transpose)
    y = mosaic_tpu.apply(x, _operands(weight), problem, k=weight.k, n=weight.n, interpret=interpret)
    return y if weight.layout.lookup not in COMPUTED else y * _scale_of_integers(weight, problem)


def product_grouped(
    x: jax.Array,
    weight: PackedWeight,
    groups: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any,
    interpret: Any,
) -> jax.Array:
    """``x[i] @ W[groups[i]]`` in float32."""
    del out_dtype
    problem = _problem(x.shape[1], weight, transpose=False)
    y = mosaic_tpu.apply_grouped(
        x,
        _operands(weight),
        problem,
        groups,
        sizes,
        k=weight.k,
        n=weight.n,
        interpret=interpret,
    )
    if weight.layout.lookup not in COMPUTED:
        return y
    return y * jnp.take(_scale_of_integers(weight, problem), groups)[:, None, None]


def canonical_columns(weight: PackedWeight, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Canonical words of some columns, and their scales."""
    problem = _problem(PACKED_ROWS, weight, transpose=False)
    planes = tuple(take_columns(plane, columns) for plane in weight.planes)
    codes = unpack_planes(planes, weight.bits, problem.config.lookup)
    scales = mosaic_tpu.untiled(weight.scales, problem)
    return pack(codes, weight.bits), take_columns(scales, columns)


def _scale_of_integers(weight: PackedWeight, problem: Any) -> jax.Array:
    """What one of the kernel's integers is in the table: a number for every weight."""
    return step_of_line(weight.lut) / mosaic_tpu.unit_of_integers(problem)


def _operands(weight: PackedWeight) -> tuple:
    return weight.planes, weight.scales, weight.table, None


def _problem(m: int, weight: PackedWeight, transpose: bool) -> Any:
    """The tiles of the layout for another number of rows of ``x``."""
    rows = min(64, -(-m // 16) * 16)
    return mosaic_tpu.make_problem(
        jax.ShapeDtypeStruct((m, weight.n if transpose else weight.k), weight.dtype),
        weight.words_like(),
        jax.ShapeDtypeStruct((1, 2**weight.bits, weight.p), jnp.float32),
        k=weight.k,
        group_size=weight.group_size,
        transpose=transpose,
        config=dataclasses.replace(weight.layout, block_m=rows, scale_weights=transpose),
    )
