"""Fixtures of the training programs."""

import pytest

from tests.train.standard_promotion import standard_promotion


@pytest.fixture(name="standard_promotion")
def standard_promotion_fixture():
    with standard_promotion():
        yield
