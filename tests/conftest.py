"""Settings that every test runs under: no silent promotion of dtypes or ranks, quick compiles."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Their tests compile many tiny programs: compiling is what they would spend their time on.
_COMPILE_QUICKLY = ("adapters", "arrays", "calibrate", "lift", "linear_maps", "models", "optim")


@pytest.fixture(autouse=True)
def quick_compiles(request):
    rooms = Path(__file__).parent / "lutjax"
    if not any(request.path.is_relative_to(rooms / room) for room in _COMPILE_QUICKLY):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
