"""What is known of arrays while a program is traced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def is_traced(array: Any) -> bool:
    """Whether an array is one that a program is traced with.

    Tracers are instances of ``jax.Array``, though their class is none of its subclasses.

    >>> import jax.numpy as jnp
    >>> is_traced(jnp.ones(2)), jax.eval_shape(lambda a: a * is_traced(a), 1.0).shape
    (False, ())
    """
    return isinstance(array, jax.Array) and not issubclass(type(array), jax.Array)


def concrete(array: Any) -> np.ndarray | None:
    """The values of an array, or None while it is traced and has none yet."""
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError:
        return None
