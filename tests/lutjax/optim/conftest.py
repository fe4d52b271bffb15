"""Optimisers run under standard promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's optimisers mix dtypes, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
