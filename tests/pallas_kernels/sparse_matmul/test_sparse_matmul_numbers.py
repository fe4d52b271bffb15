"""Every implementation of ``sparse_matmul`` against a float64 oracle, over one list of cases."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from sparse_cases import CASES, TOLERANCE, Case, make, oracle, relative_error, run

from pallas_kernels import native
from pallas_kernels.lut_matmul import xla
from pallas_kernels.sparse_matmul import IMPLEMENTATIONS, row_matmul
from pallas_kernels.sparse_matmul.dispatch import SPARSE_MATMUL

# What an implementation must run at least, so that a change cannot quietly give cases up.
AT_LEAST = {
    "reference": len(CASES),
    "masked": len(CASES),
    "xla": 26,
    "cpu_native": 25 if native.availability() is None else 0,
    "pallas_triton": 28,
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The interpreter unrolls a kernel into a large XLA program that runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_numbers(name, case):
    operands, dense = make(case)
    y = run(name, operands)
    if isinstance(y, str):
        pytest.skip(y)
    assert y.dtype == operands[0].dtype
    assert relative_error(y, oracle(operands, dense)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        Case(m=5, k=77, bits=4, lanes=32, offsets=True, dtype="float32"),
        Case(m=3, bits=3, lanes=16, per_row=True, dtype="float32"),
        Case(m=2, bits=2, tables=256, dtype="float32"),
    ],
    ids=str,
)
def test_loops_over_tiles_of_rows(case, monkeypatch):
    monkeypatch.setattr(xla, "_TILE", 24 * case.n)
    (x, weight, thresholds), dense = make(case)
    operands = (x, weight, thresholds)
    expected = oracle(operands, dense)
    assert relative_error(run("masked", operands), expected) < TOLERANCE[case.dtype]
    z = jax.numpy.asarray(expected, x.dtype)
    back = row_matmul(z, weight, transpose=True)
    assert relative_error(back, np.asarray(z, np.float64) @ dense.T) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["reference", "masked", "xla", "cpu_native"])
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype="float32"),
        Case(bits=4, offsets=True, dtype="float32"),
        Case(bits=4, canonical=True, offsets=True, dtype="float32"),
    ],
    ids=str,
)
def test_numbers_in_x64_mode(name, case):
    operands, dense = make(case)
    with jax.enable_x64(True):
        y = run(name, operands)
    if isinstance(y, str):
        pytest.skip(y)
    assert y.dtype == operands[0].dtype
    assert relative_error(y, oracle(operands, dense)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_support_is_not_given_up(name):
    module = SPARSE_MATMUL.backend(name)
    supported = [module.supports(*make(case)[0]) is None for case in CASES]
    assert sum(supported) >= AT_LEAST.get(name, 8)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case", [Case(n=128, dtype="float32"), Case(bits=4, lanes=128, n=1024)], ids=str
)
def test_nan_activations_are_not_hidden_and_dead_rows_are_not_read(name, case):
    tiled = name == "mosaic_tpu" and not case.bits
    case = dataclasses.replace(case, tiled=tiled, canonical=name == "cpu_native")
    (x, weight, thresholds), _ = make(case)
    x = x.at[0, 7].set(np.nan)
    y = run(name, (x, weight, thresholds))
    assert not isinstance(y, str) and np.isnan(np.asarray(y, np.float32)).all()
    if case.bits or name in ("reference", "masked"):
        return
    # 0 * NaN is NaN: a dead row of NaN shows only if it takes part in the product
    x = x.at[0, 7].set(0)
    poisoned = weight.at[7].set(np.nan)
    y = run(name, (x, poisoned, thresholds))
    assert np.isfinite(np.asarray(y, np.float32)).all()
