"""Settings that every test runs under: no silent promotion of dtypes or ranks, quick compiles."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):  # later ones have no choice
    # XLA's newer emitters of fused loops take 40 % of the time of these tests to compile. The
    # doctests, the demo and the tests on newer versions of JAX compile with them.
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_TESTS = Path(__file__).parent


def _compiles_quickly(path: Path) -> bool:
    """Not where compiled code is what is tested (kernels), or where it runs for long (SmolLM2)."""
    return not path.is_relative_to(_TESTS / "pallas_kernels") and "smollm2" not in path.name


@pytest.fixture(autouse=True, scope="module")
def quick_compiles(request):
    """Compiling many tiny programs is what most tests would spend their time on."""
    quickly = _compiles_quickly(request.path)
    if jax.config.read("jax_disable_most_optimizations") != quickly:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()  # of programs that were compiled the other way


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Compiled programs are mappings of memory: XLA crashes where a process has 65530 of them."""
    yield
    mappings = Path("/proc/self/maps")  # of Linux
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request):
    """Each test starts the generator of its module, where there is one, from the beginning."""
    generator = getattr(request.module, "RNG", None)
    if generator is not None:
        generator.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture
def standard_promotion():
    """Optax's optimisers mix dtypes, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
