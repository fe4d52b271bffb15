"""Argument checks of the lookup-table product; everything is raised before anything is computed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.layout import BLOCK, MAX_BITS
from pallas_kernels.manual_axes import in_manual_axes
from pallas_kernels.scales import QuantizedScales


def check_arguments(
    x: Any,
    words: Any,
    scales: Any,
    lut: Any,
    offsets: Any = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
) -> None:
    """Raises ValueError or TypeError, naming shapes, if the arguments do not fit each other."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} must be a positive integer, the number of rows of the weight")
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"group_size={group_size!r} must be a positive integer; for one group a column use {k}"
        )
    if words.dtype != jnp.uint8:
        raise TypeError(f"words must be uint8 in the canonical packed layout, got {words.dtype}")
    for name, array in (("x", x), ("scales", scales), ("lut", lut), ("offsets", offsets)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}{list(array.shape)}")
    if words.ndim != 3:
        raise ValueError(
            f"words must have shape [ceil(K/8), bits, N], got {words.shape}; "
            "map over leading axes with jax.vmap"
        )
    if lut.ndim != 3:
        raise ValueError(f"lut must have shape [T, 2**bits, p], got {lut.shape}")
    blocks, bits, n = words.shape
    tables, entries, p = lut.shape
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"words of shape {words.shape} mean {bits} bits a code; 1 to {MAX_BITS} are possible"
        )
    if tables not in (1, n):
        raise ValueError(
            f"lut of shape {lut.shape} has {tables} tables; words of shape {words.shape} "
            f"need 1 or N={n}"
        )
    if entries != 2**bits:
        raise ValueError(
            f"lut of shape {lut.shape} has {entries} entries; words of shape {words.shape} "
            f"hold {bits}-bit codes and need {2**bits}"
        )
    expected_blocks = -(-k // (BLOCK * p))
    if blocks != expected_blocks:
        raise ValueError(
            f"words of shape {words.shape} hold {blocks} blocks of {BLOCK} codes; k={k} with "
            f"vector length p={p} needs {expected_blocks}"
        )
    expected = (-(-k // group_size), n)
    for name, array in (("scales", scales), ("offsets", offsets)):
        if array is not None and array.shape != expected:
            message = (
                f"{name} of shape {array.shape} must have shape {expected} = [ceil(K/G), N] "
                f"for k={k}, group_size={group_size} and words of shape {words.shape}"
            )
            if isinstance(array, QuantizedScales) and in_manual_axes():
                message += (
                    f"; inside shard_map, shards of K must be whole blocks of {BLOCK} groups, as "
                    "codes of scales are packed by eight: expand them first (lutjax.prepack does)"
                )
            raise ValueError(message)
        if isinstance(array, QuantizedScales):
            array.check()
    contracted, axis = (n, "N") if transpose else (k, "K")
    if x.ndim < 1 or x.shape[-1] != contracted:
        raise ValueError(
            f"x of shape {x.shape} must end in {axis}={contracted} to be multiplied by the "
            f"{'transposed ' if transpose else ''}weight [K={k}, N={n}]"
        )
