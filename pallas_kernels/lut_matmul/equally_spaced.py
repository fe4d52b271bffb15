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
        if not getattr(lut, "is_fully_addressable", True) and not lut.is_fully_replicated:
            return None
        tables = np.asarray(lut, np.float64).reshape(-1, *lut.shape[-3:])
    except TypeError:  # traced, or a shape without values
        return None
    if not np.isfinite(tables).all():
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


def step_of_line(lut: jax.Array) -> jax.Array:
    """The distance of neighbouring entries of equally spaced tables ``[..., 1, 2**bits, 1]``.

    >>> step_of_line(jnp.arange(-8.0, 8.0).reshape(1, 16, 1)).item()
    1.0
    """
    first, last = (lut[..., 0, i, 0].astype(jnp.float32) / 2 for i in (0, -1))  # may be large
    return (last - first) / ((lut.shape[-2] - 1) / 2)


def centred(
    lut: jax.Array, scales: jax.Array, offsets: jax.Array | None, zero: int
) -> tuple[jax.Array, jax.Array | None]:
    """Table and offsets of the same weight, with zero at the middle code.

    >>> lut, scales = jnp.arange(4.0).reshape(1, 4, 1), jnp.full((1, 1), 10.0)
    >>> lut, offsets = centred(lut, scales, None, zero=0)
    >>> lut[0, :, 0].tolist(), offsets.tolist()
    ([-2.0, -1.0, 0.0, 1.0], [[20.0]])
    """
    entries = lut.shape[-2]
    middle = entries // 2
    if zero == middle:
        return lut, offsets
    step = step_of_line(lut)
    moved = scales.astype(jnp.float32) * ((middle - zero) * step)
    codes = jnp.arange(-middle, entries - middle, dtype=jnp.float32).reshape(1, -1, 1)
    offsets = moved if offsets is None else offsets.astype(jnp.float32) + moved
    return codes * step, offsets
