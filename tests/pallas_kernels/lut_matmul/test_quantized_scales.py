"""Scales that are quantised themselves, in products of every kind and as functions of JAX."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lut_cases import (
    QUANTIZED,
    TOLERANCE,
    Case,
    Form,
    make,
    operands,
    oracle,
    plain,
    relative_error,
)

from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.scales import expanded, some_columns
from pallas_kernels.sparse_matmul import BlockCodes, sparse_matmul

CASE = Case(m=3, k=200, n=72, group_size=8, dtype="float32", offsets=True)
CASE = dataclasses.replace(CASE, form=Form(6, (8, 1), zero=20), scale_dtype="float16")
FLOOR = dataclasses.replace(CASE, form=Form(5, (2, 20), floor=True))


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_expanded_they_are_those_of_the_formula(case):
    data = make(case)
    scales, expected = data["scales"], plain(data, "scales")
    assert scales.shape == scales.expand().shape == expected.shape
    assert (scales.ndim, scales.dtype) == (2, jnp.float32)
    np.testing.assert_allclose(scales.expand(), expected, rtol=2e-7)


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("case", QUANTIZED[::3], ids=str)
def test_every_product_takes_them(case, implementation):
    data = make(case)
    y = lut_matmul(*operands(data), **case.static, implementation=implementation)
    assert relative_error(y, oracle(case, data)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [CASE, FLOOR], ids=str)
@pytest.mark.parametrize("m", [1, 4, 7])
def test_sparse_products_take_them(case, m):
    _, words, scales, lut, offsets = operands(make(case))
    weight = BlockCodes(words, scales, lut, offsets, case.k, case.group_size)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(m, case.k)), jnp.float32)
    y = sparse_matmul(x, weight, 0.7)
    # The same sums of float32, whose scales may be rounded once less.
    np.testing.assert_allclose(y, sparse_matmul(x, expanded(weight), 0.7), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", [CASE, FLOOR], ids=str)
def test_gradients_are_those_of_expanded_ones(case):
    x, words, scales, lut, offsets = operands(make(case))

    def loss(form, x, scales, lut, offsets):
        y = lut_matmul(x, words, *form((scales, lut, offsets)), **case.static)
        return jnp.sum(jnp.sin(y))

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, form), argnums=(0, 1, 2, 3), allow_int=True))(
            x, scales, lut, offsets
        )
        for form in (lambda tree: tree, expanded)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype != jax.dtypes.float0:
            # sin of sums of 200 products in float32
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2)


def test_weights_are_mapped():
    data = [operands(make(CASE, seed)) for seed in range(2)]
    x, *stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *data)
    product = functools.partial(lut_matmul, **CASE.static)
    expected = jnp.stack([product(*one) for one in data])
    assert jnp.array_equal(jax.jit(jax.vmap(product))(x, *stacked), expected)
    # Some parts of the scales only.
    _, words, scales, lut, offsets = data[0]
    scales = dataclasses.replace(scales, steps=jnp.stack([scales.steps, 2 * scales.steps]))
    axes = dataclasses.replace(scales, words=None, steps=0)
    mapped = jax.vmap(product, in_axes=(None, None, axes, None, None))
    both = mapped(x[0], words, scales, lut, offsets)
    assert jnp.array_equal(both[0], expected[0])
    assert not jnp.array_equal(both[1], expected[0])


@pytest.mark.parametrize("case", [CASE, FLOOR], ids=str)
def test_columns_stay_quantised(case):
    scales = make(case)["scales"]
    columns = jnp.array([71, 0, 40, 41])
    part = some_columns(scales, lambda a: a[..., columns])
    assert part.words.shape[-1] == 4
    assert jnp.array_equal(part.expand(), scales.expand()[:, columns])


def test_what_does_not_fit_is_an_error():
    x, words, scales, lut, offsets = operands(make(CASE))
    wrong = dataclasses.replace(scales, steps=scales.steps[:, :-1])
    message = r"quantised scales \(25, 72\) with blocks of 8 x 1 have steps \(4, 71\)"
    with pytest.raises(ValueError, match=message):
        lut_matmul(x, words, wrong, lut, offsets, **CASE.static)
    wrong = dataclasses.replace(scales, padding=0)
    with pytest.raises(ValueError, match=r"offsets of shape \(32, 72\) must have shape \(25, 72\)"):
        lut_matmul(x, words, scales, lut, wrong, **CASE.static)
