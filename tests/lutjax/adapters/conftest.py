"""These tests compile many tiny programs, so compiling is what they would spend their time on."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's optimisers mix dtypes, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
