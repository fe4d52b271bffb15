"""Weights joined by columns: what the parts stand for, in as few products as they allow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax import DoubleQuant, LutConfig, Rule
from lutjax.arrays import (
    ConcatArray,
    DenseArray,
    LowRankArray,
    LutArray,
    QuantizedScales,
    RotatedArray,
    SumArray,
    quantize_scales_like,
    side_by_side,
)
from lutjax.packing import pack
from lutjax.transforms import quantize_array

K, SIZES = 96, (24, 8, 16)
DENSE = [
    np.random.default_rng(n).normal(size=(2, K, n)).astype(np.float32) for n in SIZES
]  # two weights each


def quantized(**config):
    rule = Rule("*", LutConfig(**config))
    return [quantize_array(jnp.asarray(w), rule) for w in DENSE]


def tables_of_columns():
    shapes = [(2, n, 16, 1) for n in SIZES]
    tables = [np.random.default_rng(1).normal(size=shape).astype(np.float32) for shape in shapes]
    return [
        dataclasses.replace(part, lut=jnp.asarray(table))
        for part, table in zip(quantized(bits=4), tables, strict=True)
    ]


def low_rank(rank):
    return [LowRankArray.of(jnp.asarray(w[:, :, :rank]), jnp.asarray(w[:, :rank])) for w in DENSE]


def sums():
    parts = zip(quantized(bits=3, group_size=32), low_rank(2), strict=True)
    return [SumArray.of(a, b) for a, b in parts]


def kinds(weight):
    """The classes of a weight and of what it holds."""
    inner = getattr(weight, "parts", ())
    if isinstance(weight, RotatedArray):
        inner = (weight.base,)
    return (type(weight), *(kinds(part) for part in inner)) if inner else type(weight)


def coded_scales():
    like = QuantizedScales(jnp.zeros((1, 6, 1), jnp.uint8), jnp.ones((1, 1)), None, 7, (2, 1))
    return [
        dataclasses.replace(part, scales=quantize_scales_like(part.scales, like))
        for part in quantized(bits=4, group_size=16)
    ]


APART = (ConcatArray, LutArray, LutArray, LutArray)
CASES = {
    "one table": (lambda: quantized(bits=4, group_size=32), LutArray),
    "offsets": (lambda: quantized(bits=3, group_size=32, codebook="affine"), LutArray),
    "tables of columns": (tables_of_columns, LutArray),
    "rotated": (lambda: quantized(bits=4, group_size=32, rotate=True), (RotatedArray, LutArray)),
    "sums": (sums, (SumArray, LutArray, (ConcatArray, *[LowRankArray] * 3))),
    "tables of weights": (lambda: quantized(bits=2, codebook="kmeans"), APART),
    "quantised scales": (
        lambda: quantized(bits=4, group_size=32, double_quant=DoubleQuant()),
        APART,
    ),
    "coded scales": (coded_scales, LutArray),
    "bits": (lambda: [*quantized(bits=4)[:2], quantized(bits=3)[2]], APART),
    "groups": (lambda: [*quantized(bits=4)[:2], quantized(bits=4, group_size=32)[2]], APART),
    "dense and not": (
        lambda: [jnp.asarray(DENSE[0]), *quantized(bits=4)[1:]],
        (ConcatArray, DenseArray, LutArray, LutArray),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_parts(case):
    make, expected_kinds = CASES[case]
    parts = make()
    whole = side_by_side(*parts)
    assert kinds(whole) == expected_kinds
    assert whole.shape == (2, K, sum(SIZES)) and whole.dtype == parts[0].dtype
    dense = [part if isinstance(part, jax.Array) else part.materialize() for part in parts]
    dense = np.concatenate(dense, axis=-1)
    np.testing.assert_array_equal(whole.materialize(), dense)
    x = np.random.default_rng(9).normal(size=(2, 3, K)).astype(np.float32)
    expected = x.astype(np.float64) @ dense.astype(np.float64)
    np.testing.assert_allclose(whole.matmul(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "zero"), [(6, 32), (8, 128), (4, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_scales_are_found_again_in_their_form(bits, zero, sign):
    """As GGUF has them: the largest of a block may be that of code 0, and steps may be negative."""
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 2**bits, (16, 8)).astype(np.uint8)
    codes[0] = 0 if zero else 2**bits - 1
    steps = sign * rng.uniform(0.5, 1, (1, 8)).astype(np.float16)
    scales = QuantizedScales(pack(codes, bits), jnp.asarray(steps), None, 0, (16, 1), zero)
    found = quantize_scales_like(scales.expand(), scales)
    np.testing.assert_array_equal(found.expand(), scales.expand())


def test_dense_weights_stay_dense():
    whole = side_by_side(*map(jnp.asarray, DENSE))
    np.testing.assert_array_equal(whole, np.concatenate(DENSE, axis=-1))


def test_tables_that_are_traced_cannot_be_compared():
    with pytest.raises(TypeError, match=r"outside jax\.jit"):
        jax.jit(side_by_side)(*quantized(bits=4))


def test_views_of_other_shapes_are_refused():
    turned = [part.transpose((0, 2, 1)) for part in quantized(bits=4)]
    with pytest.raises(ValueError, match=r"is not stored as \[\*batch, K, N\]"):
        side_by_side(*turned)


def test_rows_have_to_agree():
    with pytest.raises(ValueError, match="cannot concatenate"):
        side_by_side(*quantized(bits=4)[:2], jnp.ones((2, 48, 8)))
