"""In which dtype numbers are computed with that are stored in a narrower one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """The dtype that decompositions and rotations run in: float32, or float64 when asked for it.

    >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def wider(dtype: Any, other: Any) -> Any:
    """The floating-point dtype with more bits, the first one of equals or if the other is None.

    >>> wider(jnp.bfloat16, jnp.float16), wider(jnp.bfloat16, jnp.float32)
    (dtype(bfloat16), dtype('float32'))
    """
    more = other is not None and jnp.finfo(other).bits > jnp.finfo(dtype).bits
    return jnp.dtype(other if more else dtype)


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in a floating-point dtype if that is :func:`wider` than its own."""
    return x.astype(wider(x.dtype, dtype))


def product(x: jax.Array, matrix: jax.Array, out_dtype: Any = None) -> jax.Array:
    """``x @ matrix``: factors in the dtype of ``x``, sums rounded once to ``out_dtype`` or that.

    >>> product(jnp.ones((1, 257), jnp.bfloat16), jnp.ones((257, 1)), jnp.float32)
    Array([[257.]], dtype=float32)
    """
    wide = wider(x.dtype, out_dtype)
    y = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=wide)
    return y if out_dtype is None else y.astype(out_dtype)


def add_wide(terms: Sequence[jax.Array]) -> jax.Array:
    """The sum of arrays of one dtype: added in at least float32, rounded once.

    >>> add_wide([jnp.bfloat16(256), jnp.bfloat16(1), jnp.bfloat16(1)])
    Array(258, dtype=bfloat16)
    """
    dtype = terms[0].dtype
    wide = [term.astype(at_least_float32(dtype)) for term in terms]
    return functools.reduce(operator.add, wide).astype(dtype)
