"""Codes and scales against bitsandbytes' (tests/data/bitsandbytes)."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lutjax

FILE = Path(__file__).parents[1] / "data" / "bitsandbytes" / "nf4.npz"

CASES = [
    ("rand", "rand_nf4_bs64_f32", 64, "float32"),
    ("rand", "rand_nf4_bs64_bf16", 64, "bfloat16"),
    ("rand", "rand_nf4_bs128_f32", 128, "float32"),
    ("rand", "rand_nf4_bs128_bf16", 128, "bfloat16"),
    ("smollm2_l0_q_rows0_32", "smollm2_l0_q_rows0_32_nf4_bs64_f32", 64, "float32"),
]


@pytest.fixture(scope="module")
def fixture():
    return dict(np.load(FILE))


def test_table(fixture):
    # bitsandbytes has the table as printed constants, which are the formula's to six digits.
    np.testing.assert_allclose(lutjax.LutConfig().table(), fixture["nf4_code"], rtol=1e-6)


@pytest.mark.parametrize(("source", "name", "block", "dtype"), CASES)
def test_equals_bitsandbytes(fixture, source, name, block, dtype):
    """Its matrices are [out, in] with blocks along `in` that align with the rows here."""
    n, k = fixture[source].shape
    weight = jnp.asarray(fixture[source].T, dtype)
    array = lutjax.quantize({"kernel": weight}, group_size=block, scale_dtype="float32")["kernel"]
    packed = fixture[name + "_packed"]
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(n, k)
    np.testing.assert_array_equal(array.codes(), codes.T)
    absmax = fixture[name + "_absmax"].reshape(n, k // block)
    np.testing.assert_array_equal(array.scales, absmax.T)
    dense = array.astype(jnp.float32).materialize()
    expected = fixture[name + "_dequant"].T
    if dtype == "bfloat16":
        dense = dense.astype(jnp.bfloat16).astype(jnp.float32)
    # Its table has six to seven digits; bfloat16 rounds that difference away.
    rtol = 1e-6 if dtype == "float32" else 0
    np.testing.assert_allclose(dense, expected, rtol=rtol, atol=0)
