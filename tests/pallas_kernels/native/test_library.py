"""The C++ kernels are there: without them their tests would be skipped."""

import pytest

from pallas_kernels import native
from pallas_kernels.native import library


def test_the_kernels_compile_where_there_is_a_compiler():
    try:
        library.compiler()
    except library.BuildError as error:
        pytest.skip(str(error))
    assert native.availability() is None
