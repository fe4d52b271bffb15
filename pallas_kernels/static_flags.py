"""Truth values that are known while tracing, kept among the residuals of a ``custom_vjp``."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def flag(on: bool) -> jax.Array:
    """A truth value as the shape of an empty array.

    The structure of residuals must not depend on what is differentiated: JAX keeps one structure
    for all uses of a traced call.

    >>> is_on(flag(True)), is_on(flag(False))
    (True, False)
    """
    return jnp.zeros((int(on), 0), jnp.uint8)


def is_on(flag: jax.Array) -> bool:
    """The truth value again."""
    return flag.shape[-2] > 0  # vmap may have put an axis in front
