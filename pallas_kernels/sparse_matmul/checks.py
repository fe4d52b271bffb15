"""Argument checks of the sparse product; everything is raised before anything is computed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.lut_matmul import checks as lut_checks
from pallas_kernels.sparse_matmul.blocks import BlockCodes
from pallas_kernels.sparse_matmul.rows import RowCodes


def check_arguments(x: Any, weight: Any, thresholds: Any) -> None:
    """Raises ValueError or TypeError, naming shapes, if the arguments do not fit each other."""
    if isinstance(weight, RowCodes):
        _check_codes(weight)
    elif isinstance(weight, BlockCodes):
        lut_checks.check_arguments(
            x,
            weight.words,
            weight.scales,
            weight.lut,
            weight.offsets,
            k=weight.k,
            group_size=weight.group_size,
        )
    elif weight.ndim not in (2, 3):
        raise ValueError(
            f"weight must have shape [K, N] or [K, N / L, L], got {weight.shape}; "
            "map over leading axes with jax.vmap"
        )
    elif not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"weight must be floating point, got {weight.dtype}{list(weight.shape)}")
    k, n = matrix_shape(weight)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, got {x.dtype}{list(x.shape)}")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x of shape {x.shape} must end in K={k} of the weight [K={k}, N={n}]")
    if thresholds.shape not in ((), (1,), (k,)):
        raise ValueError(
            f"thresholds of shape {thresholds.shape} must have shape (), (1,) or {(k,)} for K={k}"
        )


def matrix_shape(weight: Any) -> tuple[int, int]:
    """K and N of a dense or packed weight."""
    if isinstance(weight, (BlockCodes, RowCodes)):
        return weight.shape
    k, *rest = weight.shape
    return k, rest[0] if len(rest) == 1 else rest[0] * rest[1]


def _check_codes(weight: RowCodes) -> None:
    words, scales, lut, size = weight.words, weight.scales, weight.lut, weight.group_size
    if words.dtype != jnp.uint32 or words.ndim != 3:
        raise TypeError(
            f"words must be uint32[K, blocks, L] as pack_rows makes them, got "
            f"{words.dtype}{list(words.shape)}"
        )
    k, blocks, lanes = words.shape
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"group_size={size!r} must be a positive integer; for one group use {k}")
    if scales.ndim != 2 or scales.shape[0] != -(-k // size):
        raise ValueError(f"scales of shape {scales.shape} must have shape ({-(-k // size)}, N)")
    n = scales.shape[1]
    entries = lut.shape[-2] if lut.ndim == 3 else 0
    if lut.ndim != 3 or lut.shape[0] not in (1, n) or lut.shape[2] != 1 or entries.bit_count() != 1:
        raise ValueError(f"lut of shape {lut.shape} must have shape [1 or N={n}, 2**bits, 1]")
    columns = weight.fields * lanes
    if blocks != -(-n // columns):
        raise ValueError(
            f"words of shape {words.shape} hold {blocks} blocks of {columns} {weight.bits}-bit "
            f"codes; N={n} needs {-(-n // columns)}"
        )
    if weight.offsets is not None and weight.offsets.shape != scales.shape:
        raise ValueError(f"offsets of shape {weight.offsets.shape} must have shape {scales.shape}")
