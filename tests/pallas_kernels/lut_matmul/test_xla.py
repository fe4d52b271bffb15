"""The XLA implementation against the formula in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from lut_cases import CASES, TOLERANCE, Case, make, operands, oracle, relative_error

from pallas_kernels.lut_matmul import xla

MORE_CASES = [
    *(Case(m=1, bits=b, dtype="float32") for b in range(1, 9)),
    *(Case(m=2, bits=b, k=200, n=40, group_size=48, dtype="float32") for b in (1, 3, 4, 6)),
    *(Case(bits=b, dtype="float32") for b in (1, 5, 6, 7)),
    Case(m=1, k=77, group_size=77, n=33, bits=3),
    Case(m=1, k=1040, group_size=1040, n=16, dtype="float32"),  # one long group, summed in parts
    Case(m=1, k=77, group_size=100, n=33, dtype="float32", offsets=True),
    Case(m=1, k=576, group_size=128, n=64, dtype="float32", offsets=True),
    Case(m=1, k=100, group_size=20, n=16, dtype="float32"),  # groups that split blocks
    Case(m=1, tables="channel", dtype="float32"),
    Case(m=1, p=2, dtype="float32"),
]


def error(case: Case) -> float:
    data = make(case)
    product = functools.partial(xla.lut_matmul, **case.static)
    assert xla.supports(*operands(data), **case.static) is None
    y = jax.jit(product)(*operands(data))
    assert y.dtype == data["x"].dtype
    return relative_error(y, oracle(case, data))


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=str)
def test_equals_the_formula(case):
    assert error(case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        Case(k=576, n=64, group_size=128, dtype="float32", offsets=True),
        Case(k=205, n=24, group_size=48, dtype="float32", m=1, p=2, tables="channel"),
        Case(k=576, n=64, group_size=128, dtype="float32", transpose=True),
        Case(k=300, n=64, group_size=300, m=1, dtype="float32"),
        Case(k=576, n=64, group_size=64, m=2, bits=3, dtype="float32", offsets=True),
        # ranges of columns, the last one shorter or not
        Case(k=576, n=300, group_size=64, m=2, dtype="float32", offsets=True),
        Case(k=205, n=192, group_size=64, m=1, bits=8, dtype="float32"),
        Case(k=205, n=300, group_size=64, m=9, dtype="float32", tables="channel", offsets=True),
        Case(k=202, n=256, group_size=32, m=3, dtype="float32", p=2),
    ],
    ids=str,
)
def test_loops_over_tiles_equal_the_formula(case, monkeypatch):
    monkeypatch.setattr(xla, "_TILE", 48 * 64)
    monkeypatch.setattr(xla, "_LOOKUPS", 64 * 64)
    monkeypatch.setattr(xla, "_UNIT", 64)
    monkeypatch.setattr(xla, "_TILE_COLUMNS", 128)
    assert error(case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("m,transpose", [(1, False), (64, False), (1, True)])
def test_the_dequantised_weight_is_never_held(m, transpose):
    k, n = 1024, 16384
    shapes = (
        jax.ShapeDtypeStruct((m, n if transpose else k), jnp.float32),
        jax.ShapeDtypeStruct((k // 8, 4, n), jnp.uint8),
        jax.ShapeDtypeStruct((k // 64, n), jnp.float32),
        jax.ShapeDtypeStruct((1, 16, 1), jnp.float32),
    )
    product = functools.partial(xla.lut_matmul, k=k, group_size=64, transpose=transpose)
    compiled = jax.jit(product).lower(*shapes).compile()
    # A quarter of the float32 weight; a tile, its codes and a few vectors are less.
    assert compiled.memory_analysis().temp_size_in_bytes < k * n


def test_leading_axes_of_the_activations():
    case = Case(m=6, dtype="float32")
    data = make(case)
    x, *weight = operands(data)
    flat = xla.lut_matmul(x, *weight, **case.static)
    folded = xla.lut_matmul(x.reshape(2, 3, -1), *weight, **case.static)
    assert folded.shape == (2, 3, case.n)
    assert jnp.array_equal(folded.reshape(6, -1), flat)
