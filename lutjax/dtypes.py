"""In which dtype numbers are computed with that are stored in a narrower one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """The dtype that decompositions and rotations run in: float32, or float64 when asked for it.

    >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
