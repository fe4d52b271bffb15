"""Prepacked weights give the bits of the unpacked product."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from lut_cases import Case, make, operands, oracle, relative_error

from pallas_kernels.lut_matmul import packed_matmul, prepack


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_tpu_layout_serves_any_number_of_rows(m, kind):
    case = Case(m=m, k=200, n=72, group_size=96, bits=3, offsets=True)
    data = make(case)
    x, words, scales, lut, offsets = operands(data)
    packed = prepack(
        words,
        scales,
        lut,
        offsets,
        k=case.k,
        group_size=case.group_size,
        implementation="mosaic_tpu",
        device_kind=kind,
    )
    y = packed_matmul(x[None], packed, interpret=True)
    assert y.shape == (1, m, case.n)
    assert relative_error(y[0], oracle(case, data)) <= 1.1e-2


def test_without_a_layout_of_its_own_the_words_stay_canonical():
    case = Case()
    x, words, scales, lut, _ = operands(make(case))
    packed = prepack(words, scales, lut, k=256, group_size=64, implementation="reference")
    np.testing.assert_array_equal(packed.planes[0], words)
    leaves = jax.tree.leaves(packed)
    assert len(leaves) == 3  # no offsets
    with pytest.raises(ValueError, match=r"x of shape \(4, 255\) must end in K=256"):
        packed_matmul(x[:, :-1], packed)


def test_a_weight_that_the_kernel_does_not_take_is_refused():
    case = Case(bits=8, tables="channel")
    _, words, scales, lut, _ = operands(make(case))
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu.*a table for each of 128 columns"):
        prepack(words, scales, lut, k=256, group_size=64, implementation="mosaic_tpu")
