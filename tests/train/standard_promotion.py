"""How the programs of `train/` run in tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Optax's optimisers mix dtypes, which strict promotion refuses; and compiling is quick."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
