"""Tables with equally spaced entries, which a kernel can compute instead of looking them up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def zero_of_line(lut: jax.Array) -> int | None:
    """The code of zero in a table whose entries are equally spaced; None for other tables.

    None as well if that cannot be known, because the table is traced or on other hosts, and where
    there are several tables that are not the same.

    >>> zero_of_line(jnp.arange(-8.0, 8.0).reshape(1, 16, 1))
    8
    """
    try:
        if not (lut.is_fully_addressable or lut.is_fully_replicated):
            return None
        tables = np.asarray(lut, np.float64).reshape(-1, *lut.shape[-3:])
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None
    if tables.shape[1] != 1 or tables.shape[3] != 1 or (tables != tables[:1]).any():
        return None
    entries = tables[0, 0, :, 0]
    zeros = np.flatnonzero(entries == 0)
    if len(zeros) != 1:
        return None
    zero, last = int(zeros[0]), len(entries) - 1
    line = (np.arange(last + 1) - zero) * (entries[-1] - entries[0]) / last
    # As near as the rounding of entries and ends to float32 lets them be.
    return zero if (np.abs(entries - line) <= 2**-22 * np.abs(line)).all() else None


def with_entries(
    entries: np.ndarray, scales: jax.Array, lut: jax.Array, offsets: jax.Array | None, zero: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The same weight with other equally spaced entries: scales, table and offsets."""
    step = (lut[0, -1, 0] - lut[0, 0, 0]).astype(jnp.float32) / (entries[-1] - entries[0])
    scales = scales.astype(jnp.float32) * step
    if entries[zero]:  # what stands for zero is not zero
        moved = scales * -entries[zero]
        offsets = moved if offsets is None else offsets.astype(jnp.float32) + moved
    return scales, jnp.asarray(entries).reshape(1, -1, 1), offsets
