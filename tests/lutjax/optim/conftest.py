"""Optimisers run under standard promotion."""

import pytest


@pytest.fixture(autouse=True)
def optax_promotion(standard_promotion):
    """Every test here has it."""
